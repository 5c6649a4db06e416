"""From a configuration (ConfigDict) to what the library takes: a run's description and the options of its parts."""

import math
from typing import Any

import jax

from gspn_jax import data
from gspn_jax.runs import Run, RunDescription, new_run
from gspn_jax.runs.generation import describe_input
from gspn_jax.training import MeshOptions, MixingOptions, OptimizerOptions, TrainOptions

# What may change when a run is continued: it changes nothing but rounding, or is a remedy when a kernel misbehaves.
FREE_KEYS = (
    "compilation_cache",
    "data.num_threads",
    "data.num_workers",
    "data.on_corrupt",
    "data.path",
    "intervals",
    "keep",
    "mesh",
    "model.implementation",
    "model.keep_states",
    "model.remat",
    "model.variant",
    "profile_steps",
)


def make_run(config: Any, dataset: data.Dataset) -> Run:
    """Returns the run that a configuration describes, without parameters.

    Raises:
        ValueError: an unknown task, or data that the task cannot use.
    """
    return new_run(describe(config, dataset))


def describe(config: Any, dataset: data.Dataset) -> RunDescription:
    """Returns what a run is, as JSON; ValueError for data that the task cannot use."""
    values = config.to_dict()
    options = {key: value for key, value in values["model"].items() if value is not None}
    name = options.pop("name")
    kept = ("name", "path", "image_size", "resize", "exif_rotation", "mean", "std")
    description: Any = {
        "task": values["task"],
        "model": {"name": name, "options": options},
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "data": {key: values["data"][key] for key in kept if key in values["data"]},
        "config": values,
    }
    if values["task"] == "generation":
        described = {key: _value(values, key) for key in ("objective", "label_dropout")}
        description |= described | {"input": describe_input(dataset.latents, values["data"]["image_size"])}
    elif dataset.latents is not None:
        raise ValueError(f"data.name: expected images, which a classifier takes, got {dataset.name}")
    elif "mean" not in values["data"] and values["task"] == "classification":
        raise ValueError("task: expected generation, as this file configures, got classification")
    return description


def _value(values: dict[str, Any], key: str) -> Any:
    if key not in values:
        raise ValueError(f"task: expected classification, as this file configures, got {values['task']}")
    return values[key]


def task_options(config: Any) -> dict[str, Any]:
    """Returns the options of a task that only matter while training."""
    return {"mixing": MixingOptions(**config.mixing.to_dict())} if "mixing" in config else {}


def training_batches(config: Any, source: data.Source | data.Latents) -> data.Batches:
    """Returns the training batches of this process."""
    return data.training_batches(
        source,
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        augmentation=data.Augmentation(**config.augmentation.to_dict()),
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        on_corrupt=config.data.on_corrupt,
        exif_rotation=config.data.exif_rotation,
    )


def steps_per_epoch(config: Any, source: data.Source | data.Latents) -> int:
    """Returns the optimiser steps that see about as many images as there are."""
    return max(1, len(source) // max(1, config.batch_size))


def train_options(config: Any, epoch: int, workdir: str) -> TrainOptions:
    """Returns the options of the training loop. epoch: optimiser steps per epoch."""

    def interval(name: str) -> int:
        epochs = config.intervals[name]
        if not 0 <= epochs < math.inf:
            raise ValueError(f"intervals.{name}: expected a number >= 0, got {epochs}")
        return max(1, round(epochs * epoch)) if epochs else 0

    if config.steps < 0:
        raise ValueError(f"steps: expected an integer >= 0, got {config.steps}")
    return TrainOptions(
        workdir=workdir,
        num_steps=config.steps or config.epochs * epoch,
        batch_size=config.batch_size,
        seed=config.seed,
        accumulate=config.accumulate,
        log_steps=config.intervals.log_steps,
        evaluate_steps=interval("evaluate_epochs"),
        checkpoint_steps=interval("checkpoint_epochs"),
        keep=config.keep,
        mesh=MeshOptions(**config.mesh.to_dict()),
        profile_steps=_profile_steps(config.profile_steps),
    )


def optimizer_options(config: Any, epoch: int, num_steps: int) -> OptimizerOptions:
    """Returns the options of the optimiser. A run cut short by `config.steps` warms up in the same share of its steps.

    Args:
        config: the configuration.
        epoch: optimiser steps per epoch.
        num_steps: optimiser steps of the run.
    """
    if config.epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {config.epochs}")
    options = config.optimizer.to_dict()
    epochs = options.pop("warmup_epochs")
    if not 0 <= epochs <= config.epochs:
        raise ValueError(f"optimizer.warmup_epochs: expected 0 to epochs = {config.epochs}, got {epochs}")
    warmup = epochs * epoch
    if config.steps:
        warmup *= min(1.0, config.steps / (config.epochs * epoch))
    return OptimizerOptions(warmup_steps=min(round(warmup), num_steps - 1), **options)


def check_sizes(config: Any) -> None:
    """Raises ValueError where an evaluation could not cut the image out of the resized one."""
    image_size, resize = config.data.image_size, config.data.resize
    if resize and resize < image_size:
        raise ValueError(
            f"data.resize: expected 0 (image_size / 0.875) or at least image_size = {image_size}, got {resize}"
        )


def _profile_steps(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit()):
        raise ValueError(f"profile_steps: expected FIRST:END such as 10:15, got {text!r}")
    return int(first), int(end)
