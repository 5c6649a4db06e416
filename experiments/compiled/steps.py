"""Peak memory, compile time and least time of whole train steps on an H200, compiled on a machine without one.

    python -m experiments.compiled.steps --only=gspn_t --output=experiments/results/step_report

Writes OUTPUT.csv and OUTPUT.md with a row for each step: forward, loss, backward, AdamW and moving average in bfloat16,
with the state donated. Needs requirements-gpu-compile.txt and no GPU; a step takes half a minute to six minutes. No
column is a time measured on a GPU.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from configs import classifier, generator
from experiments import command_line, settings
from experiments.compiled import programs, report
from experiments.compiled.report import Report, Row
from gspn_jax import data
from gspn_jax.models.autoencoder import LATENT_SCALE
from gspn_jax.runs import Run, new_run
from gspn_jax.runs.description import mixer_of
from gspn_jax.training import OptimizerOptions, Task, TrainOptions
from gspn_jax.training.optimizer import make_optimizer
from gspn_jax.training.state import initial_state
from gspn_jax.training.step import make_step
from pallas_kernels.mosaic import compile_only

STEPS = 1000  # of the run: enters the learning-rate schedule and changes no number of the report
KEPT, REMAT = "kept", "remat"
NOTE = (
    f"{programs.NOTE} The loss of generators is DiT's, with a learned variance; where compile_s is missing it is the "
    "mean squared error of the noise only. blocks: kept, or computed again (remat). Each row names its commit."
)
COLUMNS = ("model", "variant", "blocks", "batch", *programs.COLUMNS)


class Propagation(NamedTuple):
    """How the propagation is computed: options of `GSPNMixer`."""

    implementation: str
    variant: str | None = None
    keep_states: bool = True


class Setting(NamedTuple):
    """The task, optimiser and batch of a train step."""

    task: Task
    optimizer: OptimizerOptions
    batch: dict[str, jax.ShapeDtypeStruct]


class Model(NamedTuple):
    """A network at the batch size of its row. `setting` takes (propagation, remat, batch size)."""

    batch_size: int
    setting: Callable[[Propagation, bool, int], Setting]
    propagates: bool = True  # attention has no variants


class Step(NamedTuple):
    """A train step to compile. `blocks`: "remat" computes each block again in the backward pass, "kept" does not."""

    model: str
    variant: str
    blocks: str

    def __str__(self) -> str:
        return " ".join(self)


def classifier_setting(preset: str, size: int, propagation: Propagation, remat: bool, batch_size: int) -> Setting:
    """Returns a preset of configs/classifier.py with 1,000 classes, on images of `size` pixels a side, in bfloat16."""
    config: Any = classifier.get_config(preset)
    config.batch_size, config.model.remat, config.model.dtype = batch_size, remat, "bfloat16"
    run = _run(config, data.load("fake", None), propagation)
    return Setting(
        task=run.make_task(**settings.task_options(config)),
        optimizer=settings.optimizer_options(config, STEPS // config.epochs, STEPS),
        batch={
            "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        },
    )


def generator_setting(preset: str, propagation: Propagation, remat: bool, batch_size: int) -> Setting:
    """Returns a preset of configs/generator.py with 1,000 classes, on latents of 256 pixels a side, in bfloat16."""
    config: Any = generator.get_config(preset)
    config.batch_size, config.model.remat, config.model.dtype = batch_size, remat, "bfloat16"
    side = config.data.image_size // 8
    latents = data.LatentSpace((side, side, 4), LATENT_SCALE, autoencoder="")
    dataset = dataclasses.replace(data.load("fake", None), latents=latents)
    run = _run(config, dataset, propagation)
    moments = jax.ShapeDtypeStruct((batch_size, *latents.shape), jnp.float32)
    return Setting(
        task=run.make_task(),
        optimizer=settings.optimizer_options(config, STEPS // config.epochs, STEPS),
        batch={
            "mean": moments,
            "log_variance": moments,
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        },
    )


def _run(config: Any, dataset: data.Dataset, propagation: Propagation) -> Run:
    """Returns the run of a configuration with 1,000 classes and, where its mixer is GSPN, with these kernels."""
    description: Any = settings.describe(config, dataset) | {"num_classes": 1000}
    if mixer_of(description) == "gspn":
        description["model"]["options"] |= propagation._asdict()
    return new_run(description)


MODELS = {
    "gspn_t": Model(128, functools.partial(classifier_setting, "gspn_t", 224)),
    "gspn_xl2": Model(32, functools.partial(generator_setting, "gspn_xl2")),
    "dit_xl2": Model(32, functools.partial(generator_setting, "dit_xl2"), propagates=False),
}
PROPAGATIONS = {
    "xla": Propagation("xla"),
    "mosaic": Propagation("mosaic"),  # each layer takes the variant that the estimate prefers
    "scans": Propagation("mosaic", "scans"),
    "scans_h_again": Propagation("mosaic", "scans", keep_states=False),
    "low_rank": Propagation("mosaic", "low_rank"),
    "low_rank_h_again": Propagation("mosaic", "low_rank", keep_states=False),
}
ORDER = {"model": list(MODELS), "variant": list(PROPAGATIONS), "blocks": [KEPT, REMAT]}


def steps() -> list[Step]:
    """Returns all steps of the report."""
    return [
        Step(model, name, blocks)
        for model in MODELS
        for name, propagation in PROPAGATIONS.items()
        if MODELS[model].propagates or name == "xla"
        # A block that is computed again computes its states again too.
        for blocks in ((KEPT, REMAT) if propagation.keep_states else (KEPT,))
    ]


def compile_step(setting: Setting) -> jax.stages.Compiled:
    """Compiles the step that `train` would run on one H200, from abstract arrays."""
    batch_size = next(iter(setting.batch.values())).shape[0]
    transform = make_optimizer(setting.optimizer, num_steps=STEPS, batch_size=batch_size)
    state = jax.eval_shape(
        functools.partial(initial_state, setting.task.init, transform, seed=0, keep_ema=setting.optimizer.ema_decay > 0)
    )
    options = TrainOptions(workdir="never written", num_steps=STEPS, batch_size=batch_size)
    mesh: Any = jax.sharding.AbstractMesh((1, 1), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    shardings = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), state)
    step = make_step(setting.task.loss, transform, setting.optimizer, options, shardings, mesh)
    # Without jit and its mesh, which has no device: compilation places everything on one.
    return compile_only.compile_for_h200(inspect.unwrap(step), state, setting.batch, donate_argnums=0).compiled


def compile_rows(step: Step, batch_size: int = 0) -> list[Row]:
    """Returns the row of a step, with the error where it does not compile."""
    model = MODELS[step.model]
    batch_size = batch_size or model.batch_size
    row: Row = dict.fromkeys(COLUMNS, "") | step._asdict() | {"batch": batch_size}

    def compile_program() -> jax.stages.Compiled:
        return compile_step(model.setting(PROPAGATIONS[step.variant], step.blocks == REMAT, batch_size))

    return [row | programs.compiled_row(compile_program)]


def page(about: Mapping[str, str], rows: Sequence[Row]) -> str:
    """Returns the table in Markdown."""

    def name(row: Mapping[str, str]) -> tuple[str, str]:
        return f"{row['model']} {row['variant']} {row['blocks']}", row["batch"]

    title = "Train steps, compiled for an H200 and not executed"
    return report.header(title, about) + programs.table(("step", "batch"), name, rows)


def define_flags() -> None:
    report.define_flags("step_report")
    flags.DEFINE_integer("batch_size", 0, "Batch size instead of the model's; 0 keeps the model's.", lower_bound=0)


def main() -> None:
    compile_one = functools.partial(compile_rows, batch_size=flags.FLAGS.batch_size)
    rows = Report(compile_one, COLUMNS, ORDER, page, NOTE).run(report.chosen(steps()), flags.FLAGS.output)
    report.refuse_faults(rows, lambda row: f"{row['model']} {row['variant']} {row['blocks']}: {row['fault']}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
