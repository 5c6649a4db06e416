"""Builds the parts of a text-to-image model from published files or from a workdir, and makes such a workdir."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gspn_jax.models.registry import checked_dtype
from gspn_jax.text import Tokenizer
from gspn_jax.text_to_image.parts import Parts
from gspn_jax.text_to_image.published import NETWORKS, TOKENIZERS, Published, read_published
from gspn_jax.training import load_parameters, save_parameters
from gspn_jax.weights import diffusers_autoencoder, read_arrays
from gspn_jax.weights.clip import clip_text
from gspn_jax.weights.unet import diffusers_unet

TASK = "text_to_image"
REPLACEMENTS = "replacements"  # beside the networks in a workdir

# What `Autoencoder` supports; the first value is diffusers' default for an absent key.
_AUTOENCODER: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None,),
    **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), (True,)),
}


def load_parts(
    source: str | os.PathLike[str],
    *,
    mixer: str | None = None,
    replacements: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    alignment: str | None = None,
    chunk: int | None = 4,
    dtype: Any = jnp.float32,
    config: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    initial: str = "teacher",
) -> Parts:
    """Loads a model; see `TextToImage.load` for arguments and errors."""
    source = os.fspath(source)
    given: dict[str, Any] = dict(mixer=mixer, alignment=alignment, chunk=chunk, options=options, initial=initial)
    released = _released(replacements)
    if (Path(source) / "checkpoints").is_dir():
        if config is not None:
            raise ValueError(f"config: expected none for a workdir, which holds its own, got {config}")
        published, described = read_workdir(source)
        if mixer is None and released is None:
            released = published.arrays.get(REPLACEMENTS)
            given = {**given, **described["model"]["options"]} | ({"alignment": alignment} if alignment else {})
    else:
        published = read_published(source, None if config is None else os.fspath(config))
    try:
        return build_parts(published, released=released, dtype=dtype, **given)
    except ValueError as error:
        raise ValueError(f"{error} (in {source})") from error


def build_parts(
    published: Published,
    *,
    mixer: str | None = None,
    released: Mapping[str, Any] | None = None,
    alignment: str | None = None,
    chunk: int | None = 4,
    dtype: Any = jnp.float32,
    options: Mapping[str, Any] | None = None,
    initial: str = "teacher",
) -> Parts:
    """Builds a model of its files.

    Args:
        published: the files.
        mixer, alignment, chunk, dtype, options, initial: see `TextToImage.load`.
        released: parameters of the mixers; None for new ones.

    Raises:
        ValueError: names the key or parameter at fault.
    """
    dtype, mixer = checked_dtype(dtype), "attention" if mixer is None else mixer
    arrays, configs = published.arrays, published.configs
    towers = [name for name in NETWORKS if name.startswith("text_encoder") and name in arrays]
    autoencoder = configs["vae"]
    for key, supported in _AUTOENCODER.items():
        if autoencoder.get(key, supported[0]) not in supported:
            raise ValueError(f"vae/config.json: expected {key} to be {supported[0]!r}, got {autoencoder[key]!r}")
    return Parts(  # the UNet, which takes longest, after all that may be wrong elsewhere
        tokenizers=tuple(Tokenizer.from_pretrained(folder) for folder in published.tokenizers),
        text_encoders=tuple(clip_text(arrays[name], configs[name], dtype=dtype) for name in towers),
        autoencoder=diffusers_autoencoder(
            arrays["vae"],
            norm_groups=autoencoder.get("norm_num_groups", 32),
            dtype=jnp.dtype("float32") if dtype.name == "float16" else dtype,  # float16 overflows in SDXL's
        ),
        unet=diffusers_unet(
            arrays["unet"],
            configs["unet"],
            mixer=mixer,
            replacements=released,
            alignment=alignment,
            chunk=chunk,
            dtype=dtype,
            mixer_options=options,
            initial=initial,
        ),
        mixer=mixer if isinstance(mixer, str) else "",
        mixer_options={
            **{key: str(value) for key, value in (options or {}).items()},
            "alignment": alignment,
            "chunk": chunk,
        },
        latent_scale=autoencoder.get("scaling_factor", 0.18215),
        scheduler=configs["scheduler"],
        zero_negative=bool(configs["model_index"].get("force_zeros_for_empty_prompt", len(towers) == 2)),
        sample_size=configs["unet"].get("sample_size", 64 if len(towers) == 1 else 128),
    )


def convert(
    source: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    mixer: str | None = None,
    replacements: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    alignment: str | None = None,
    chunk: int | None = 4,
    dtype: Any = jnp.float32,
    config: str | os.PathLike[str] | None = None,
) -> tuple[dict[str, Any], int]:
    """Makes a workdir of a published model; `TextToImage.load` and `gspn_jax.load_run` take it.

    It holds the tensors under their published names, the self-attention too, so that a later load may choose another
    mixer.

    Args:
        source, replacements, config: see `TextToImage.load`.
        workdir: a folder without checkpoints.
        mixer, alignment, chunk: what loading the workdir takes by default.
        dtype: of the stored parameters.

    Returns:
        The description, and the number of parameters.

    Raises:
        ValueError: names the argument, file, key or parameter at fault.
        CheckpointError: the workdir holds checkpoints already or cannot be written.
    """
    dtype = checked_dtype(dtype)
    published = read_published(os.fspath(source), None if config is None else os.fspath(config))
    released = _released(replacements)
    parts = build_parts(published, mixer=mixer, released=released, alignment=alignment, chunk=chunk, dtype=dtype)
    networks = published.arrays | ({} if released is None else {REPLACEMENTS: released})
    floats = {
        part: {name: np.asarray(array, dtype) for name, array in arrays.items() if np.asarray(array).dtype.kind != "i"}
        for part, arrays in networks.items()
    }
    size = parts.sample_size * parts.autoencoder.factor
    description: dict[str, Any] = {
        "task": TASK,
        "model": {
            "name": "custom",
            "network": "unet",
            "options": {"mixer": parts.mixer, "alignment": alignment, "chunk": chunk},
        },
        "num_classes": 0,
        "class_names": [],
        "data": {"name": "", "path": "", "image_size": size, "resize": 0},
        "configs": {name: dict(mapping) for name, mapping in published.configs.items()},
    }
    save_parameters(workdir, floats, description)
    for folder, name in zip(published.tokenizers, TOKENIZERS, strict=False):
        shutil.copytree(folder, Path(workdir) / name, dirs_exist_ok=True)
    return description, sum(array.size for arrays in floats.values() for array in arrays.values())


def read_workdir(workdir: str | os.PathLike[str], step: int | None = None) -> tuple[Published, dict[str, Any]]:
    """Reads a workdir of `convert`; returns its files and its description.

    Raises:
        ValueError: a workdir of another task.
        CheckpointError: no checkpoint is good.
    """
    arrays, description = load_parameters(workdir, step)
    if description.get("task") != TASK:
        raise ValueError(f"source: expected a workdir of {TASK}, got one of {description.get('task')}: {workdir}")
    return as_published(workdir, arrays, description), description


def as_published(
    workdir: str | os.PathLike[str], arrays: Mapping[str, Any], description: Mapping[str, Any]
) -> Published:
    """Returns the files that a workdir's parameters and description stand for."""
    names = TOKENIZERS[: 1 + ("text_encoder_2" in arrays)]
    return Published(dict(arrays), dict(description["configs"]), tuple(Path(workdir) / name for name in names))


def _released(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if source is None or isinstance(source, Mapping):
        return source
    path = Path(source) / "diffusion_pytorch_model.safetensors"
    return read_arrays(path if Path(source).is_dir() else source, argument="replacements")
