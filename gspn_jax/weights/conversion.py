"""Published parameters to a workdir, as a training run would leave one."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from gspn_jax import data, models
from gspn_jax.models.autoencoder import LATENT_FACTOR, LATENT_SCALE
from gspn_jax.training import save_parameters
from gspn_jax.training.functional import to_nested
from gspn_jax.training.tasks.generation import OBJECTIVES
from gspn_jax.weights.dit import facebook_dit, facebook_dit_sizes
from gspn_jax.weights.files import read_arrays
from gspn_jax.weights.gspn import (
    nvlabs_classifier,
    nvlabs_classifier_sizes,
    nvlabs_generator,
    nvlabs_generator_sizes,
)
from gspn_jax.weights.torch_layouts import unwrapped

# A parameter that only this network has.
_MARKS = {
    "dit": "blocks.0.adaLN_modulation.1.weight",
    "generator": "in_blocks.0.x_conv_down.weight",
    "classifier": "classifier.head.weight",
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` wrote.

    Attributes:
        description: of the run, as its checkpoint and its config.json hold it.
        parameters: how many numbers.
    """

    description: dict[str, Any]
    parameters: int


def convert(
    source: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    class_names: Sequence[str] = (),
    alignment: str | None = None,
    chunk: int | None = None,
    global_stages: Sequence[int] | None = None,
    global_blocks: Sequence[int] | None = None,
    objective: str | None = None,
    num_heads: int | None = None,
    image_size: int | None = None,
    resize: int | None = None,
) -> Converted:
    """Makes a workdir of published parameters: a classifier or generator of GSPN's authors, a DiT or a SiT.

    The parameters' names tell the network and their shapes its sizes. What they do not tell, the options below say;
    None stands for what the released parameters were trained with. Sizes of a preset give the model its name, others
    make it "custom".

    Args:
        source: a file, as `read_arrays` takes it.
        workdir: a folder without checkpoints.
        class_names: in the order of the labels; by default "class 0", "class 1", ...
        alignment: of GSPN; by default "unturned".
        chunk: of GSPN: lines of a local block; by default 2.
        global_stages: of a classifier: stages with global blocks, from 0; by default the preset's, else (2, 3).
        global_blocks: of a GSPN generator: global blocks, from 0 in order of execution; by default none.
        objective: of a generator or DiT: "ddpm" (default), or the interpolant of a SiT: "linear" or "gvp".
        num_heads: of a DiT; by default what the published network of its width has.
        image_size: side of the images in pixels; by default 224 for a classifier, 256 for the others.
        resize: of a classifier: short side before the centre crop in pixels; by default 0, image_size / 0.875.

    Raises:
        ValueError: names the argument or tensor at fault.
        CheckpointError: the workdir holds checkpoints already or cannot be written.
    """
    if not os.fspath(workdir):
        raise ValueError("workdir: expected a folder, got ''")
    given = dict(
        alignment=alignment, chunk=chunk, global_stages=global_stages, global_blocks=global_blocks,
        objective=objective, num_heads=num_heads, image_size=image_size, resize=resize,
    )  # fmt: skip
    arrays = unwrapped(read_arrays(source))
    network = _network(arrays)
    build, accepted = _NETWORKS[network]
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    unused = [key for key in options if key not in accepted.split()]
    if unused:
        raise ValueError(f"{unused[0]}: expected none for a {network}, got {options[unused[0]]}")
    try:
        model, description = build(arrays, **options)
    except ValueError as error:
        message = str(error)
        raise ValueError(f"source: {source}: {message}" if message.startswith("arrays: ") else message) from error
    count = description["num_classes"]
    if class_names and len(class_names) != count:
        raise ValueError(f"class_names: expected {count}, as the network has classes, got {len(class_names)}")
    description["class_names"] = list(class_names) or [f"class {number}" for number in range(count)]
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = to_nested({tuple(map(str, path)): variable.get_value() for path, variable in flat})
    save_parameters(os.fspath(workdir), params, description)
    return Converted(description, sum(variable.get_value().size for _, variable in flat))


def _network(arrays: Mapping[str, Any]) -> str:
    for network, mark in _MARKS.items():
        if mark in arrays:
            return network
    first = min(arrays, default="nothing")
    raise ValueError(f"source: expected a network of GSPN's authors, a DiT or a SiT, got names such as {first[:80]}")


def _classifier(
    arrays: Mapping[str, np.ndarray],
    *,
    alignment: str = "unturned",
    chunk: int = 2,
    global_stages: Sequence[int] | None = None,
    image_size: int = 224,
    resize: int = 0,
) -> tuple[nnx.Module, dict[str, Any]]:
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if resize and resize < image_size:
        raise ValueError(f"resize: expected 0 or at least image_size = {image_size}, got {resize}")
    options = {**nvlabs_classifier_sizes(arrays), "stem_stride": 4}
    count = options.pop("num_classes")
    name = _preset("classifier", options, stem_stride=4, expansion=1.5, mlp_ratio=4.0)
    released: Sequence[int] = models.PRESETS[name].options["global_stages"] if name else (2, 3)
    stages = released if global_stages is None else global_stages
    chosen: Any = dict(alignment=alignment, chunk=chunk, global_stages=tuple(stages))
    model = nvlabs_classifier(arrays, **chosen)
    size: dict[str, Any] = dict(image_size=image_size, resize=resize)
    normalisation: dict[str, Any] = dict(mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD)
    return model, {
        "task": "classification",
        "model": _described(name, "classifier", options | chosen),
        "num_classes": count,
        "data": {"name": "image_folder", "path": "", **size, **normalisation},
    }


def _generator(
    arrays: Mapping[str, np.ndarray],
    *,
    alignment: str = "unturned",
    chunk: int = 2,
    global_blocks: Sequence[int] = (),
    **denoising: Any,
) -> tuple[nnx.Module, dict[str, Any]]:
    sizes = nvlabs_generator_sizes(arrays)
    name = _preset("generator", sizes, proxy_rank=max(sizes["width"] // 16, 1))
    chosen: Any = dict(alignment=alignment, chunk=chunk, global_blocks=tuple(global_blocks))
    described = _denoiser(name, "generator", sizes | chosen, **denoising)
    return nvlabs_generator(arrays, **chosen), described


def _dit(
    arrays: Mapping[str, np.ndarray], *, num_heads: int | None = None, **denoising: Any
) -> tuple[nnx.Module, dict[str, Any]]:
    sizes = facebook_dit_sizes(arrays)
    heads = {sizes["width"]: sizes["num_heads"] for sizes in _presets("dit").values()}
    if num_heads is None and sizes["width"] not in heads:
        raise ValueError(f"num_heads: expected a number, since no published DiT has width {sizes['width']}; got none")
    chosen: Any = dict(num_heads=heads[sizes["width"]] if num_heads is None else num_heads)
    name = _preset("dit", sizes | chosen, mlp_ratio=4.0)
    described = _denoiser(name, "dit", sizes | chosen, **denoising)
    return facebook_dit(arrays, **chosen), described


def _denoiser(
    name: str | None, network: str, options: dict[str, Any], *, objective: str = "ddpm", image_size: int = 256
) -> dict[str, Any]:
    """The description of a denoiser. All published ones denoise latents of Stable Diffusion's autoencoder."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}; got {objective!r}")
    multiple = LATENT_FACTOR * options["patch"]
    if image_size < 1 or image_size % multiple:
        raise ValueError(f"image_size: expected a multiple of {multiple}, got {image_size}")
    count, side = options.pop("num_classes"), image_size // LATENT_FACTOR
    return {
        "task": "generation",
        "model": _described(name, network, options),
        "objective": objective,
        "label_dropout": 0.1,
        "input": {"shape": [side, side, options["in_channels"]], "scale": LATENT_SCALE, "autoencoder": ""},
        "num_classes": count,
        "data": {"name": "latents", "path": "", "image_size": image_size, "resize": 0},
    }


def _presets(network: str) -> dict[str, dict[str, Any]]:
    """The sizes of each preset of a network, its mixer's included."""
    found = {name: preset for name, preset in models.PRESETS.items() if preset.network == network}
    return {name: {**preset.options, **preset.mixer_options} for name, preset in found.items()}


def _preset(network: str, sizes: Mapping[str, Any], **defaults: Any) -> str | None:
    """The preset with these sizes; `defaults` holds what presets leave out."""
    for name, preset in _presets(network).items():
        full = {**defaults, **preset}
        if all(full[key] == sizes[key] for key in full if key in sizes):
            return name
    return None


def _described(name: str | None, network: str, options: dict[str, Any]) -> dict[str, Any]:
    """The model of a description; it names all sizes, so that a preset that changes later does not change it."""
    return {"name": name, "options": options} if name else {"name": "custom", "network": network, "options": options}


# The function of each network, and the options that it takes.
_NETWORKS = {
    "classifier": (_classifier, "alignment chunk global_stages image_size resize"),
    "generator": (_generator, "alignment chunk global_blocks objective image_size"),
    "dit": (_dit, "num_heads objective image_size"),
}
