"""A safetensors file of a published network as a workdir, as a run would leave one.

    python -m experiments.convert --source=gspn_t.safetensors --workdir=runs/gspn_t_released
    python -m experiments.evaluate --workdir=runs/gspn_t_released --data_path=ROOT
    python -m experiments.convert --source=DiT-XL-2-256x256.safetensors --workdir=runs/dit_released
    python -m experiments.sample --workdir=runs/dit_released --autoencoder=vae.safetensors --guidance=4

Which network it is shows in the parameters' names: a classifier or a generator of GSPN's authors, or a DiT or SiT,
which are told apart by --objective. A .pth file has to become a safetensors file first, where PyTorch is installed;
of a checkpoint that holds them, the moving averages are taken:

    python -c "import sys, torch, safetensors.torch as s
    m = torch.load(sys.argv[1], map_location='cpu', weights_only=True)
    m = m.get('ema', m.get('model', m))
    s.save_file({k: v.contiguous() for k, v in m.items()}, sys.argv[2])" gspn_t.pth gspn_t.safetensors
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from experiments import command_line, generation
from gspn_jax import data, models
from gspn_jax.training import save_parameters
from gspn_jax.training.functional import to_nested
from gspn_jax.weights import (
    facebook_dit,
    facebook_dit_sizes,
    nvlabs_classifier,
    nvlabs_classifier_sizes,
    nvlabs_generator,
    nvlabs_generator_sizes,
)

LATENT_SCALE, LATENT_FACTOR = 0.18215, 8  # of Stable Diffusion's autoencoder, which all published generators denoise


def classifier(
    source: str,
    workdir: str,
    *,
    alignment: str,
    chunk: int,
    global_stages: Sequence[int],
    image_size: int,
    resize: int,
    class_names: Sequence[str] = (),
) -> int:
    """Writes the workdir of a classifier; returns the number of parameters.

    Args:
        source: safetensors file with the authors' parameter names.
        workdir: folder without checkpoints.
        alignment, chunk, global_stages: as in `gspn_jax.weights.nvlabs_classifier`.
        image_size, resize: of the evaluation.
        class_names: in the order of the logits; by default "class 0", "class 1", ...

    Raises:
        ValueError, OSError, CheckpointError: in one line, what is wrong.
    """
    arrays = read_safetensors(source)
    sizes = nvlabs_classifier_sizes(arrays)
    model = nvlabs_classifier(arrays, alignment=alignment, chunk=chunk, global_stages=global_stages)
    count = sizes.pop("num_classes")
    options = {**sizes, "alignment": alignment, "chunk": chunk, "global_stages": tuple(global_stages)}
    meta = {
        "model": {"name": "gspn_t", "options": options},  # every size of the preset is replaced
        "num_classes": count,
        "class_names": _class_names(class_names, count),
        "data": {
            "name": "image_folder",
            "path": "",
            "image_size": image_size,
            "resize": resize,
            "mean": data.IMAGENET_MEAN,
            "std": data.IMAGENET_STD,
        },
    }
    return _save(model, workdir, meta)


def generator(
    source: str,
    workdir: str,
    *,
    objective: str,
    alignment: str,
    chunk: int,
    global_blocks: Sequence[int] = (),
    num_heads: int | None = None,
    image_size: int = 256,
    class_names: Sequence[str] = (),
) -> int:
    """Writes the workdir of a denoiser of latents; returns the number of parameters.

    Args:
        source: safetensors file with the parameter names of GSPN's authors or of DiT's.
        workdir: folder without checkpoints.
        objective: "ddpm", or the interpolant that a SiT was trained as: "linear", "gvp".
        alignment, chunk, global_blocks: as in `gspn_jax.weights.nvlabs_generator`.
        num_heads: of a DiT; by default what the published network of its width has.
        image_size: of the images that it was trained for.
        class_names: in the order of the labels; by default "class 0", "class 1", ...

    Raises:
        ValueError, OSError, CheckpointError: in one line, what is wrong.
    """
    generation.objective_of(objective)
    if image_size % LATENT_FACTOR:
        raise ValueError(f"image_size: expected a multiple of {LATENT_FACTOR}, got {image_size}")
    arrays = read_safetensors(source)
    if _kind(arrays) == "dit":
        sizes = facebook_dit_sizes(arrays)
        heads = num_heads or _published_heads(sizes["width"])
        model = facebook_dit(arrays, num_heads=heads)
        name, options = "dit_xl2", {**sizes, "num_heads": heads}
    else:
        sizes = nvlabs_generator_sizes(arrays)
        chosen: Any = dict(alignment=alignment, chunk=chunk, global_blocks=tuple(global_blocks))
        model = nvlabs_generator(arrays, **chosen)
        name, options = "gspn_xl2", sizes | chosen
    count, channels = options.pop("num_classes"), options["in_channels"]
    side = image_size // LATENT_FACTOR
    if side % options["patch"]:
        raise ValueError(f"image_size: expected a multiple of {LATENT_FACTOR * options['patch']}, got {image_size}")
    space = data.LatentSpace((side, side, channels), LATENT_SCALE, autoencoder="")
    meta = {
        "model": {"name": name, "options": options},  # every size of the preset is replaced
        "objective": objective,
        "label_dropout": 0.1,
        "input": generation.input_of(space, image_size),
        "num_classes": count,
        "class_names": _class_names(class_names, count),
        "data": {"name": "latents", "path": "", "image_size": image_size, "resize": 0},
    }
    return _save(model, workdir, meta)


def is_classifier(source: str) -> bool:
    """Whether a file holds one, by the names in it. Raises ValueError for a network that is not known."""
    return _kind(read_safetensors(source)) == "classifier"


def read_safetensors(path: str, argument: str = "source") -> dict[str, Any]:
    """The arrays of a file. Raises ValueError, which names the argument, where it is of another kind."""
    if Path(path).suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise ValueError(
            f"{argument}: expected a safetensors file, got {path}, which only PyTorch can read; where it is installed: "
            "torch.load(file, map_location='cpu', weights_only=True), then safetensors.torch.save_file(its 'model', "
            "target); python -m experiments.convert --help shows the command"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{argument}: expected a safetensors file, got {path}: {error}") from error


def _kind(arrays: Mapping[str, Any]) -> str:
    marks = {"x_embedder.proj.weight": "generator", "classifier.head.weight": "classifier"}
    names = {name.removeprefix("module.") for name in arrays}
    if "blocks.0.adaLN_modulation.1.weight" in names:
        return "dit"
    for mark, kind in marks.items():
        if mark in names:
            return kind
    first = next(iter(sorted(names)), "nothing")
    raise ValueError(f"source: expected a network of GSPN's authors, a DiT or a SiT, got names such as {first}")


def _published_heads(width: int) -> int:
    heads = {preset["width"]: preset["num_heads"] for preset in models.DITS.values()}
    if width not in heads:
        raise ValueError(f"num_heads: expected a number, since no published DiT has width {width}; got none")
    return heads[width]


def _class_names(given: Sequence[str], count: int) -> list[str]:
    if given and len(given) != count:
        raise ValueError(f"class_names: expected {count}, as the network has classes, got {len(given)}")
    return list(given) or [f"class {number}" for number in range(count)]


def _save(model: nnx.Module, workdir: str, meta: dict[str, Any]) -> int:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = to_nested({tuple(map(str, path)): variable.get_value() for path, variable in flat})
    save_parameters(workdir, params, meta)
    return sum(variable.get_value().size for _, variable in flat)


def define_flags() -> None:
    flags.DEFINE_string("source", None, "Safetensors file with the authors' parameter names.", required=True)
    flags.DEFINE_string("workdir", None, "Folder to make.", required=True)
    flags.DEFINE_enum("alignment", "unturned", ["unturned", "aligned"], "unturned: as released.")
    flags.DEFINE_integer("chunk", 2, "Lines of a local block.", lower_bound=1)
    flags.DEFINE_list("global_stages", ["2", "3"], "Stages with global blocks, from 0; GSPN-S has 3 alone.")
    flags.DEFINE_list("global_blocks", [], "Of a generator, from 0; the released ones have none.")
    flags.DEFINE_enum("objective", "ddpm", generation.OBJECTIVES, "Of a generator; SiT's are linear.")
    flags.DEFINE_integer("num_heads", None, "Of a DiT; by default what the published one of its width has.")
    flags.DEFINE_integer("image_size", None, "Side of the images; by default 224, of generators 256.", lower_bound=1)
    flags.DEFINE_integer("resize", 0, "Short side before the centre crop; 0: image size / 0.875.", lower_bound=0)
    flags.DEFINE_string("class_names", None, "Text file, one class a line, in the order of the labels.")


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    chosen = flags.FLAGS
    shared: Any = dict(
        alignment=chosen.alignment,
        chunk=chosen.chunk,
        class_names=Path(chosen.class_names).read_text().splitlines() if chosen.class_names else (),
    )
    if is_classifier(chosen.source):
        count = classifier(
            chosen.source,
            chosen.workdir,
            global_stages=command_line.integers("global_stages", chosen.global_stages),
            image_size=chosen.image_size or 224,
            resize=chosen.resize,
            **shared,
        )
    else:
        count = generator(
            chosen.source,
            chosen.workdir,
            objective=chosen.objective,
            global_blocks=command_line.integers("global_blocks", chosen.global_blocks),
            num_heads=chosen.num_heads,
            image_size=chosen.image_size or 256,
            **shared,
        )
    print(f"{count:,} parameters written to {chosen.workdir}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
