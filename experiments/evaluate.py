"""Evaluates a trained or converted run: its parameters, and their moving average where it keeps one.

    python -m experiments.evaluate --workdir=runs/digits [--step=400] [--data_path=...]

Prints top-1 and top-5 accuracy, or the losses of a generator, and writes them to `<workdir>/evaluation.json`. Uses all
devices.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

from experiments import command_line
from gspn_jax import data, load_run

RESULTS = "evaluation.json"


def run(
    workdir: str,
    step: int | None = None,
    *,
    batch_size: int = 0,
    num_threads: int = 8,
    on_corrupt: str | None = None,
    **data_changes: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Evaluates one checkpoint.

    Args:
        workdir: of a run, or of converted weights.
        step: None for the newest good checkpoint.
        batch_size: images at a time, over all devices; 0 takes that of the training, or 128.
        num_threads: threads that read images.
        on_corrupt: "stop" or "drop" (and count) images that cannot be read; None does as the run did, or stops.
        data_changes: name, path, image_size, resize other than those of the run; None and "" change nothing. Another
            image_size without a resize takes the resize that goes with it.

    Returns:
        workdir, step, data and the numbers of the evaluation, those of the moving average with the prefix `ema_`; and
        the lines to print.

    Raises:
        ValueError, OSError, CheckpointError: in one line, what is wrong.
    """
    loaded = load_run(workdir, step=step, parameters="raw")
    changes = {name: value for name, value in data_changes.items() if value not in (None, "")}
    if "image_size" in changes:
        changes = {"resize": 0, **changes}
    described = loaded.description["data"]
    described.update(changes)
    dataset = data.load(described["name"], described["path"] or None)
    if dataset.num_classes != loaded.num_classes:
        raise ValueError(f"data: expected {loaded.num_classes} classes, as the model has, got {dataset.num_classes}")
    config = loaded.description.get("config", {})
    numbers: dict[str, Any] = {}
    for weights in loaded.weights:
        found = loaded.evaluate(
            dataset.test,
            weights=weights,
            batch_size=batch_size or config.get("batch_size", 128),
            num_threads=num_threads,
            on_corrupt=on_corrupt or config.get("data", {}).get("on_corrupt", "stop"),
        )
        numbers |= {f"ema_{name}" if weights == "ema" else name: value for name, value in found.items()}
    results = {"workdir": str(workdir), "step": loaded.step, "data": described, **numbers}
    return results, [f"step {loaded.step}, {numbers['images']} images", *loaded.summary(numbers)]


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


def main() -> None:
    values = flags.FLAGS
    results, lines = run(
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
        print(*lines, sep="\n", flush=True)
        try:
            text = json.dumps(results, indent=2, allow_nan=False)
            (Path(values.workdir) / RESULTS).write_text(text + "\n")
        except OSError as error:
            logging.warning("%s/%s is not written: %s", values.workdir, RESULTS, error.strerror or error)


if __name__ == "__main__":
    command_line.start(main, define_flags)
