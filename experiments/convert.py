"""A safetensors file of the authors' classifiers as a workdir, which `evaluate`, `predict` and `init_from` take.

    python -m experiments.convert --source=gspn_t.safetensors --workdir=runs/gspn_t_released
    python -m experiments.evaluate --workdir=runs/gspn_t_released --data_path=ROOT

A .pth file has to become a safetensors file first, where PyTorch is installed:

    python -c "import sys, torch, safetensors.torch as s
    m = torch.load(sys.argv[1], map_location='cpu', weights_only=True)
    s.save_file({k: v.contiguous() for k, v in m.get('model', m).items()}, sys.argv[2])" gspn_t.pth gspn_t.safetensors
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from experiments import command_line
from gspn_jax import data
from gspn_jax.training import save_parameters
from gspn_jax.training.functional import to_nested
from gspn_jax.weights import nvlabs_classifier, nvlabs_classifier_sizes


def run(
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
    """Writes the workdir; returns the number of parameters.

    Args:
        source: safetensors file with the authors' parameter names.
        workdir: folder without checkpoints.
        alignment, chunk, global_stages: as in `gspn_jax.weights.nvlabs_classifier`.
        image_size, resize: of the evaluation.
        class_names: in the order of the logits; by default "class 0", "class 1", ...

    Raises:
        ValueError, OSError, CheckpointError: in one line, what is wrong.
    """
    arrays = _read(source)
    sizes = nvlabs_classifier_sizes(arrays)
    model = nvlabs_classifier(arrays, alignment=alignment, chunk=chunk, global_stages=global_stages)
    count = sizes.pop("num_classes")
    if class_names and len(class_names) != count:
        raise ValueError(f"class_names: expected {count}, as the head has outputs, got {len(class_names)}")
    options = {**sizes, "alignment": alignment, "chunk": chunk, "global_stages": tuple(global_stages)}
    meta = {
        "model": {"name": "gspn_t", "options": options},  # every size of the preset is replaced
        "num_classes": count,
        "class_names": list(class_names) or [f"class {number}" for number in range(count)],
        "data": {
            "name": "image_folder",
            "path": "",
            "image_size": image_size,
            "resize": resize,
            "mean": data.IMAGENET_MEAN,
            "std": data.IMAGENET_STD,
        },
    }
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = to_nested({tuple(map(str, path)): variable.get_value() for path, variable in flat})
    save_parameters(workdir, params, meta)
    return sum(variable.get_value().size for _, variable in flat)


def _read(source: str) -> dict[str, Any]:
    if Path(source).suffix in (".pth", ".pt", ".bin"):
        raise ValueError(
            f"source: expected a safetensors file, got {source}, which only PyTorch can read; where it is installed: "
            "torch.load(source, map_location='cpu', weights_only=True), then safetensors.torch.save_file(its 'model', "
            "target); python -m experiments.convert --help shows the command"
        )
    try:
        return load_file(source)
    except SafetensorError as error:
        raise ValueError(f"source: expected a safetensors file, got {source}: {error}") from error


def define_flags() -> None:
    flags.DEFINE_string("source", None, "Safetensors file with the authors' parameter names.", required=True)
    flags.DEFINE_string("workdir", None, "Folder to make.", required=True)
    flags.DEFINE_enum("alignment", "unturned", ["unturned", "aligned"], "unturned: as released.")
    flags.DEFINE_integer("chunk", 2, "Lines of a local block.", lower_bound=1)
    flags.DEFINE_list("global_stages", ["2", "3"], "Stages with global blocks, from 0; GSPN-S has 3 alone.")
    flags.DEFINE_integer("image_size", 224, "Side of the images of the evaluation.", lower_bound=1)
    flags.DEFINE_integer("resize", 0, "Short side before the centre crop; 0: image size / 0.875.", lower_bound=0)
    flags.DEFINE_string("class_names", None, "Text file, one class a line, in the order of the logits.")


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    chosen = flags.FLAGS
    names = Path(chosen.class_names).read_text().splitlines() if chosen.class_names else ()
    count = run(
        chosen.source,
        chosen.workdir,
        alignment=chosen.alignment,
        chunk=chosen.chunk,
        global_stages=tuple(int(stage) for stage in chosen.global_stages),
        image_size=chosen.image_size,
        resize=chosen.resize,
        class_names=names,
    )
    print(f"{count:,} parameters written to {chosen.workdir}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
