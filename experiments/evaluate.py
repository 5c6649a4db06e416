"""Evaluates the parameters of a trained or converted run, and their moving average if the run keeps one.

    python -m experiments.evaluate --workdir=runs/digits [--step=400] [--data_path=...]

Prints top-1 and top-5 accuracy, or a generator's losses, and writes them to `<workdir>/evaluation.json`. Uses all
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
        workdir: folder of a run or of converted weights.
        step: step of the checkpoint; None takes the newest good one.
        batch_size: images at a time, over all devices; 0 takes the batch size of training, or 128.
        num_threads: threads that read images.
        on_corrupt: "stop" raises an error for images that cannot be decoded, "drop" leaves them out; None takes the
            run's setting, or "stop".
        data_changes: name, path, image_size and resize that replace the run's values; None and "" keep them. A new
            image_size without resize sets resize to 0, which is image_size / 0.875.

    Returns:
        A dict with workdir, step, data and the numbers of the evaluation, in which `ema_` marks those of the moving
        average; and the lines to print.

    Raises:
        ValueError, OSError, CheckpointError: the message is one line.
    """
    loaded = load_run(workdir, step=step, parameters="raw")
    changes = {name: value for name, value in data_changes.items() if value not in (None, "")}
    if "image_size" in changes:
        changes = {"resize": 0, **changes}
    described = loaded.description["data"]
    described.update(changes)
    if loaded.task_name == "text_to_image":
        raise ValueError(
            f"workdir: expected a run of classification or generation, got one of text_to_image: {workdir}"
        )
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
    flags.DEFINE_string("workdir", None, "Folder of a run or of converted weights.", required=True)
    flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest good one.")
    flags.DEFINE_integer("batch_size", 0, "Images at a time; 0: the batch size of training, or 128.")
    flags.DEFINE_integer("num_threads", 8, "Threads that read images.")
    flags.DEFINE_enum("on_corrupt", None, ["stop", "drop"], "For damaged images; by default the run's setting.")
    flags.DEFINE_string("data_name", None, "Dataset; by default the run's.")
    flags.DEFINE_string("data_path", None, "Path of the data; by default the run's.")
    flags.DEFINE_integer("image_size", None, "Side of the images in pixels; by default the run's.")
    flags.DEFINE_integer("resize", None, "Short side before the centre crop; 0: image_size / 0.875.")


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
