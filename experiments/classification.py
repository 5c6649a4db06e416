"""Classifiers out of configurations: joins models, data and training for the commands beside it.

What a run is goes into its checkpoints and its `config.json` as plain JSON, and is enough to build it again:

    {"model": {"name": ..., "options": {...}}, "num_classes": ..., "class_names": [...],
     "data": {"name": ..., "path": ..., "image_size": ..., "resize": ..., "mean": [...], "std": [...]},
     "config": {...}}

"config" is there for runs that were trained here; converted weights go without.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from gspn_jax import data, models
from gspn_jax.training import (
    Classification,
    MeshOptions,
    MixingOptions,
    OptimizerOptions,
    TrainOptions,
    load_parameters,
)
from gspn_jax.training.checkpoints import Checkpoints
from gspn_jax.training.state import Parameters
from gspn_jax.training.transfer import fit

# What may change when a run is continued: it changes nothing, or nothing but rounding.
FREE_KEYS = (
    "compilation_cache",
    "data.num_threads",
    "data.num_workers",
    "data.on_corrupt",
    "data.path",
    "data.resize",
    "intervals",
    "keep",
    "mesh",
    "model.keep_states",
    "model.remat",
    "profile_steps",
)


class Evaluates(Protocol):
    """A task as far as its evaluation goes."""

    def evaluate(self, params: Parameters, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, float]: ...


_DTYPES = ("float32", "bfloat16", "float16")
# What the shapes of the parameters do not show, with the values of a model that does not say.
_UNSEEN = {
    "mixer": "gspn",
    "alignment": "aligned",
    "chunk": 2,
    "global_stages": (),
    "stem_stride": 4,
    "activation": "none",
}


def describe(config: Any, dataset: data.Dataset) -> dict[str, Any]:
    """Returns what a run is, as JSON. ValueError for data that are no images."""
    if dataset.latents is not None:
        raise ValueError(f"data.name: expected images, which a classifier takes, got {dataset.name}")
    values = config.to_dict()
    options = {key: value for key, value in values["model"].items() if value is not None}
    name = options.pop("name")
    kept = ("name", "path", "image_size", "resize", "mean", "std")
    return {
        "model": {"name": name, "options": options},
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "data": {key: values["data"][key] for key in kept},
        "config": values,
    }


def model_builder(meta: Mapping[str, Any]) -> Callable[[nnx.Rngs], nnx.Module]:
    """Returns NNX rngs -> the classifier that `meta` describes."""
    options = model_options(meta)

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return models.build(meta["model"]["name"], num_classes=meta["num_classes"], rngs=rngs, **options)

    return build


def model_options(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a model's builder; ValueError for a dtype that is none of the computation."""
    options = dict(meta["model"]["options"])
    if options.get("dtype", "float32") not in _DTYPES:
        raise ValueError(f"model.dtype: expected one of {', '.join(_DTYPES)}; got {options['dtype']!r}")
    if "dtype" in options:
        options["dtype"] = jnp.dtype(options["dtype"])
    return options


def make_task(meta: Mapping[str, Any], mixing: MixingOptions | None = None) -> Classification:
    """Returns the task of training or evaluating the classifier that `meta` describes; ValueError if it is none."""
    if "objective" in meta:
        raise ValueError("workdir: expected a run of classification, got one of generation")
    return Classification(
        model_builder(meta),
        num_classes=meta["num_classes"],
        mean=meta["data"]["mean"],
        std=meta["data"]["std"],
        mixing=mixing,
    )


def make_training_task(meta: Mapping[str, Any], config: Any) -> Classification:
    """Returns the task of a run, which mixes images."""
    return make_task(meta, MixingOptions(**config.mixing.to_dict()))


def layer_lines(meta: Mapping[str, Any], batch_size: int) -> list[str]:
    """Returns what each line scan of the model runs on, with so many images at a time."""
    model = nnx.eval_shape(lambda: model_builder(meta)(nnx.Rngs(0)))
    size = meta["data"]["image_size"]
    return models.layer_report(model, jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32))


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
    )


def make_evaluate(
    task: Evaluates,
    source: data.Source | data.Latents,
    meta: Mapping[str, Any],
    *,
    batch_size: int,
    num_threads: int = 8,
    num_workers: int = 0,
    on_corrupt: str = "stop",
) -> Callable[[Parameters], dict[str, float]]:
    """Returns parameters -> the task's numbers on `source`; call it under a mesh, which batches are rounded up to."""

    def evaluate(params: Parameters) -> dict[str, float]:
        rows = jax.sharding.get_mesh().shape["data"]
        batches = data.evaluation_batches(
            source,
            batch_size=-(-batch_size // rows) * rows,
            image_size=meta["data"]["image_size"],
            resize=meta["data"]["resize"] or None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=num_threads,
            num_workers=num_workers,
            on_corrupt=on_corrupt,  # pyright: ignore[reportArgumentType]
        )
        try:
            numbers = task.evaluate(params, batches)
        finally:
            batches.close()
        if batches.dropped:
            logging.warning("%d corrupt images were left out of the evaluation", batches.dropped)
        return numbers

    return evaluate


def steps_per_epoch(config: Any, source: data.Source | data.Latents) -> int:
    """Returns the optimiser steps that see about as many images as there are."""
    return max(1, len(source) // max(1, config.batch_size))


def train_options(config: Any, epoch: int, workdir: str) -> TrainOptions:
    """Returns what the loop is told. `epoch`: optimiser steps per epoch."""

    def interval(name: str) -> int:
        epochs = config.intervals[name]
        if epochs < 0:
            raise ValueError(f"intervals.{name}: expected a number >= 0, got {epochs}")
        return max(1, round(epochs * epoch)) if epochs else 0

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
    """Returns what the optimiser is told. A run cut short by `config.steps` warms up in the same share of its steps."""
    if config.epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {config.epochs}")
    options = config.optimizer.to_dict()
    warmup = options.pop("warmup_epochs") * epoch
    if config.steps:
        warmup *= min(1.0, config.steps / (config.epochs * epoch))
    return OptimizerOptions(warmup_steps=min(round(warmup), num_steps - 1), **options)


def check_sizes(config: Any) -> None:
    """Raises ValueError where an evaluation could not cut the image out of what it was resized to."""
    image_size, resize = config.data.image_size, config.data.resize
    if resize and resize < image_size:
        raise ValueError(
            f"data.resize: expected 0 (image_size / 0.875) or at least image_size = {image_size}, got {resize}"
        )


def differences(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """Returns, in words, what two runs compute differently although their parameters have the same shapes.

    Args:
        source, target: as `describe` returns them; the words say what the target would have to be.
    """

    def seen(meta: Mapping[str, Any]) -> dict[str, Any]:
        options = {**_UNSEEN, **models.MODELS.get(meta["model"]["name"], {}), **meta["model"]["options"]}
        values = {f"model.{key}": options[key] for key in _UNSEEN}
        values |= {f"data.{key}": meta["data"][key] for key in ("mean", "std")}
        return values

    return worded_differences(seen(source), seen(target))


def worded_differences(was: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Returns a line for each key of a configuration, of those in both, whose values differ; lists equal tuples."""
    was, here = (
        {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in values.items()}
        for values in (was, here)
    )
    return [
        f"{key}: {was[key]} there, {here[key]} here; --config.{key}={str(was[key]).replace(' ', '')} computes the same"
        for key in was
        if key in here and was[key] != here[key]
    ]


def start_from(
    path: str, meta: Mapping[str, Any], differences: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]
) -> Callable[[Parameters], Mapping[str, np.ndarray]]:
    """Returns abstract parameters -> what fits them in the workdir `path`; prints what does not.

    Args:
        path: workdir of a run or of converted weights.
        meta: what the run that starts is.
        differences: of (the source's meta, meta) -> lines to print too: what is computed differently.
    """
    if path.endswith(".safetensors"):
        raise ValueError(f"init_from: expected a workdir, got {path}; python -m experiments.convert makes one of it")

    Checkpoints(path, read_only=True).close()  # a wrong path shows before anything is compiled

    def initial(target: Parameters) -> Mapping[str, np.ndarray]:
        source, found = load_parameters(path)
        if ("objective" in found) != ("objective" in meta):
            raise ValueError(f"init_from: expected a run of the same task, classification or generation, got {path}")
        transfer = fit(source, target)
        if jax.process_index() == 0:
            kind = "moving average" if found["ema"] else "parameters"
            print(f"from {path}, step {found['step']}, {kind}:", *transfer.report(), sep="\n")
            for line in differences(found, meta):
                print(f"  differs: {line}")
        return transfer.loaded

    return initial


def _profile_steps(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit()):
        raise ValueError(f"profile_steps: expected FIRST:END such as 10:15, got {text!r}")
    return int(first), int(end)


def accuracy_lines(numbers: Mapping[str, float]) -> list[str]:
    """Returns the last lines of a run: both accuracies, then that of the moving average where there is one."""
    lines = [f"parameters: top-1 {numbers['top1']:.2f}%, top-5 {numbers['top5']:.2f}%"]
    if "ema_top1" in numbers:
        lines.append(f"moving average: top-1 {numbers['ema_top1']:.2f}%, top-5 {numbers['ema_top5']:.2f}%")
    return [*lines, f"top-1: {numbers.get('ema_top1', numbers['top1']):.2f}%"]
