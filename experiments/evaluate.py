"""Top-1 and top-5 accuracy of a trained or converted classifier, of its parameters and of their moving average.

    python -m experiments.evaluate --workdir=runs/digits [--step=400] [--data_path=...]

Writes `<workdir>/evaluation.json`. Takes whatever devices are there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import classification, command_line
from gspn_jax import data
from gspn_jax.training import MeshOptions, load_parameters
from gspn_jax.training.sharding import make_mesh, place_tree

RESULTS = "evaluation.json"


def run(
    workdir: str,
    step: int | None = None,
    *,
    batch_size: int = 0,
    num_threads: int = 8,
    on_corrupt: str | None = None,
    **data_changes: Any,
) -> dict[str, Any]:
    """Evaluates one checkpoint.

    Args:
        workdir: of a run, or of converted weights.
        step: None for the newest good checkpoint.
        batch_size: images at a time, over all devices; 0 takes that of the training, or 128.
        num_threads: that read images.
        on_corrupt: "stop" or "drop" (and count) images that cannot be read; None does as the run did, or stops.
        data_changes: name, path, image_size, resize other than those of the run; None and "" change nothing. Another
            image_size alone takes the resize that goes with it.

    Returns:
        workdir, step, data, and top1, top5, loss, images; those of the moving average with the prefix `ema_`.

    Raises:
        ValueError, OSError, CheckpointError: in one line, what is wrong.
    """
    params, meta = load_parameters(workdir, step, ema=False)
    changes = {name: value for name, value in data_changes.items() if value not in (None, "")}
    if "image_size" in changes:
        changes = {"resize": 0, **changes}
    meta["data"] = meta["data"] | changes
    dataset = data.load(meta["data"]["name"], meta["data"]["path"] or None)
    if dataset.num_classes != meta["num_classes"]:
        raise ValueError(f"data: expected {meta['num_classes']} classes, as the model has, got {dataset.num_classes}")
    task = classification.make_task(meta)
    batch_size = batch_size or meta.get("config", {}).get("batch_size", 128)
    evaluate = classification.make_evaluate(
        task,
        dataset.test,
        meta,
        batch_size=batch_size,
        num_threads=num_threads,
        on_corrupt=on_corrupt or meta.get("config", {}).get("data", {}).get("on_corrupt", "stop"),
    )
    mesh = make_mesh(MeshOptions())
    with jax.set_mesh(mesh):
        numbers = evaluate(_everywhere(params, mesh))
        average, found = load_parameters(workdir, meta["step"], ema=True)
        if found["ema"]:
            numbers |= {f"ema_{name}": value for name, value in evaluate(_everywhere(average, mesh)).items()}
    results = {"workdir": str(workdir), "step": meta["step"], "data": meta["data"], **numbers}
    if jax.process_index() == 0:
        (Path(workdir) / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    return results


def _everywhere(params: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Any:
    return place_tree(params, jax.tree.map(lambda _: NamedSharding(mesh, P()), params))


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer("step", None, "Checkpoint; by default the newest good one.")
    flags.DEFINE_integer("batch_size", 0, "Images at a time; 0: that of the training, or 128.")
    flags.DEFINE_integer("num_threads", 8, "Threads that read images.")
    flags.DEFINE_enum("on_corrupt", None, ["stop", "drop"], "Images that cannot be read; by default as the run did.")
    flags.DEFINE_string("data_name", None, "Dataset other than that of the run.")
    flags.DEFINE_string("data_path", None, "Where the data is, if elsewhere than in the run.")
    flags.DEFINE_integer("image_size", None, "Side of the images, if another than in the run.")
    flags.DEFINE_integer("resize", None, "Short side before the centre crop; 0: image size / 0.875.")


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    values = flags.FLAGS
    results = run(
        values.workdir,
        values.step,
        batch_size=values.batch_size,
        num_threads=values.num_threads,
        on_corrupt=values.on_corrupt,
        name=values.data_name,
        path=values.data_path,
        image_size=values.image_size,
        resize=values.resize,
    )
    if jax.process_index() == 0:
        print(f"step {results['step']}, {results['images']} images", *classification.accuracy_lines(results), sep="\n")


if __name__ == "__main__":
    command_line.start(main, define_flags)
