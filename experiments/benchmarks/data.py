"""Images per second that the input pipeline makes on one processor core, by recipe.

    python -m experiments.benchmarks.data --data_path=ROOT --output=experiments/results/benchmark_data.json

ROOT holds train/CLASS/FILE and val/CLASS/FILE. One thread makes the batches. The rate by processor time is the rate of
one core and hardly depends on the machine's other work; the rate by the clock is close to it on a quiet machine.
"""

import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
from absl import flags
from PIL import features

from configs.classifier import get_config
from experiments import command_line, provenance
from gspn_jax import data

LIBRARIES = ("grain", "numpy", "pillow")
BATCH_SIZE = 16


def pipelines(dataset: data.Dataset, image_size: int) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """Returns the recipes by name, each as a function that starts an endless stream of batches."""
    config: Any = get_config("gspn_t")
    recipe = data.Augmentation(**config.augmentation.to_dict())
    plain = data.Augmentation(crop="resized", crop_scale=recipe.crop_scale, flip=True)

    def training(augmentation: data.Augmentation) -> Callable[[], Iterator[dict[str, Any]]]:
        return lambda: data.training_batches(
            dataset.train, batch_size=BATCH_SIZE, image_size=image_size, augmentation=augmentation, num_threads=0
        )

    def evaluation() -> Iterator[dict[str, Any]]:
        while True:
            yield from data.evaluation_batches(
                dataset.test, batch_size=BATCH_SIZE, image_size=image_size, num_threads=0
            )

    return {
        "train: decode, random resized crop, flip": training(plain),
        "train: the same, RandAugment, random erasing": training(recipe),
        "evaluation: decode, resize, centre crop": evaluation,
    }


def measure(start: Callable[[], Iterator[dict[str, Any]]], *, seconds: float) -> dict[str, float]:
    """Makes batches for `seconds` in each of three repetitions, after a first batch that does not count.

    Returns:
        The images of all repetitions, and the medians of images per second by the clock and by processor time.
    """
    stream = start()
    next(stream)
    counted, by_clock, by_processor = 0, [], []
    for _ in range(3):
        images, clock, processor = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - clock < seconds:
            batch = next(stream)
            images += int(np.sum(batch["mask"])) if "mask" in batch else len(batch["label"])
        by_clock.append(images / (time.perf_counter() - clock))
        by_processor.append(images / (time.process_time() - processor))
        counted += images
    rates = {"images_per_second": by_clock, "images_per_core_second": by_processor}
    return {"images": counted, **{name: round(statistics.median(values)) for name, values in rates.items()}}


def describe_run(dataset: data.Dataset) -> dict[str, Any]:
    """Returns what a reader of the measurement must know: its stamp, versions, load and images."""
    shapes = np.array([dataset.train[index][0].shape[:2] for index in range(min(200, len(dataset.train)))])
    return {
        **provenance.stamp(),
        "load_average": round(os.getloadavg()[0], 2),
        "images": f"{len(dataset.train)} files, median {int(np.median(shapes[:, 1]))}x{int(np.median(shapes[:, 0]))}",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
            "libjpeg-turbo": features.version_feature("libjpeg_turbo") or "absent",
        },
    }


def benchmark(data_path: str, *, image_size: int, seconds: float) -> dict[str, Any]:
    """Measures every pipeline on an image folder and returns the content of the results file."""
    dataset = data.load("image_folder", data_path)
    about = describe_run(dataset)
    rates = []
    for name, start in pipelines(dataset, image_size).items():
        rate = measure(start, seconds=seconds)
        per_core, by_clock = rate["images_per_core_second"], rate["images_per_second"]
        print(f"{per_core:6.0f} images/s per core, {by_clock:6.0f} by the clock: {name}", flush=True)
        rates.append({"pipeline": name, "image_size": image_size, **rate})
    return {**about, "rates": rates}


def define_flags() -> None:
    flags.DEFINE_string("data_path", None, "Image folder with train/ and val/.", required=True)
    flags.DEFINE_integer("image_size", 224, "Side of the images, in pixels.", lower_bound=1)
    flags.DEFINE_float("seconds", 10.0, "Length of each of the three repetitions.", lower_bound=0.0)
    flags.DEFINE_string("output", None, "JSON file to write.")


def main() -> None:
    chosen = flags.FLAGS
    results = benchmark(chosen.data_path, image_size=chosen.image_size, seconds=chosen.seconds)
    if chosen.output:
        pathlib.Path(chosen.output).write_text(json.dumps(results, indent=2) + "\n")
        print(f"Written to {chosen.output}.")


if __name__ == "__main__":
    command_line.start(main, define_flags)
