"""The train steps that `step_report` compiles: models, and how their propagation is computed."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from configs import classifier, generator
from experiments import classification, deviceless, generation
from gspn_jax import data, models
from gspn_jax.training import MixingOptions, OptimizerOptions, TrainOptions
from gspn_jax.training.loop import Task
from gspn_jax.training.optimizer import make_optimizer
from gspn_jax.training.state import initial_state
from gspn_jax.training.step import make_step

STEPS = 1000  # of the run that the step belongs to: a number in the schedule, nothing depends on it


class Variant(NamedTuple):
    """How the propagation is computed: options of `GSPNMixer`."""

    implementation: str
    path: str | None = None
    keep_states: bool = True

    @property
    def options(self) -> dict[str, Any]:
        return {"implementation": self.implementation, "path": self.path, "keep_states": self.keep_states}


class Setting(NamedTuple):
    """What a model is trained with."""

    task: Task
    optimizer: OptimizerOptions
    batch: dict[str, jax.ShapeDtypeStruct]


class Model(NamedTuple):
    """A network at the batch size of its report. `setting`: of (variant, remat, batch size)."""

    batch_size: int
    setting: Callable[[Variant, bool, int], Setting]
    propagates: bool = True  # else variants of propagation are nothing to it


def classifier_setting(preset: str, size: int, variant: Variant, remat: bool, batch_size: int) -> Setting:
    """A preset of configs/classifier.py with 1,000 classes, on images of `size` pixels a side, in bfloat16."""
    config: Any = classifier.get_config(preset)
    config.batch_size, config.model.remat, config.model.dtype = batch_size, remat, "bfloat16"
    meta: Any = classification.describe(config, data.load("fake", None)) | {"num_classes": 1000}
    meta["model"]["options"] |= variant.options
    return Setting(
        task=classification.make_task(meta, MixingOptions(**config.mixing.to_dict())),
        optimizer=classification.optimizer_options(config, STEPS // config.epochs, STEPS),
        batch={
            "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        },
    )


def generator_setting(preset: str, variant: Variant, remat: bool, batch_size: int) -> Setting:
    """A preset of configs/generator.py with 1,000 classes, on latents of 256 pixels a side, in bfloat16."""
    config: Any = generator.get_config(preset)
    config.batch_size, config.model.remat, config.model.dtype = batch_size, remat, "bfloat16"
    side = config.data.image_size // 8
    latents = data.LatentSpace((side, side, 4), 0.18215, autoencoder="")
    dataset = dataclasses.replace(data.load("fake", None), latents=latents)
    meta: Any = generation.describe(config, dataset) | {"num_classes": 1000}
    if config.model.name in models.GENERATORS:
        meta["model"]["options"] |= variant.options
    moments = jax.ShapeDtypeStruct((batch_size, *latents.shape), jnp.float32)
    return Setting(
        task=generation.make_task(meta),
        optimizer=classification.optimizer_options(config, STEPS // config.epochs, STEPS),
        batch={
            "mean": moments,
            "log_variance": moments,
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        },
    )


MODELS = {
    "gspn_t": Model(128, functools.partial(classifier_setting, "gspn_t", 224)),
    "gspn_xl2": Model(32, functools.partial(generator_setting, "gspn_xl2")),
    "dit_xl2": Model(32, functools.partial(generator_setting, "dit_xl2"), propagates=False),
}
VARIANTS = {
    "xla": Variant("xla"),
    "mosaic": Variant("mosaic"),  # each layer by the path that its table names
    "fused": Variant("mosaic", "fused"),
    "fused_h_again": Variant("mosaic", "fused", keep_states=False),
    "low_rank": Variant("mosaic", "low_rank"),
    "low_rank_h_again": Variant("mosaic", "low_rank", keep_states=False),
}


def compile_step(setting: Setting) -> deviceless.Compilation:
    """The step that `train` would run on one H200, of abstract arrays."""
    batch_size = next(iter(setting.batch.values())).shape[0]
    transform = make_optimizer(setting.optimizer, num_steps=STEPS, batch_size=batch_size)
    state = jax.eval_shape(
        functools.partial(initial_state, setting.task.init, transform, seed=0, keep_ema=setting.optimizer.ema_decay > 0)
    )
    options = TrainOptions(workdir="", num_steps=STEPS, batch_size=batch_size)
    mesh: Any = jax.sharding.AbstractMesh((1, 1), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    shardings = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), state)
    step = make_step(setting.task.loss, transform, setting.optimizer, options, shardings, mesh)
    # What is jitted, without the mesh, which has no device: compilation places everything on one.
    return deviceless.compile_for_h200(inspect.unwrap(step), state, setting.batch, donate_argnums=0)
