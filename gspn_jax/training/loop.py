"""The training loop of every task.

It knows no model and no dataset: a task gives parameters and a loss, an iterator gives batches, a callable evaluates.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from gspn_jax import folder_lock
from gspn_jax.training.checkpoints import Checkpoints
from gspn_jax.training.checkpoints import record as records
from gspn_jax.training.checkpoints.fingerprint import leaves_by_path
from gspn_jax.training.distributed import StopSignal
from gspn_jax.training.metrics import Clock, Means, Metrics, duration
from gspn_jax.training.optimizer import OptimizerOptions, make_optimizer
from gspn_jax.training.options import TrainOptions
from gspn_jax.training.profile import Profile
from gspn_jax.training.sharding import (
    check_batch_size,
    make_mesh,
    place_batch,
    place_tree,
    tree_shardings,
)
from gspn_jax.training.state import Parameters, TrainState, initial_state, parameter_count
from gspn_jax.training.step import make_step
from gspn_jax.training.tasks import Task


class Batches(Protocol):
    """An endless iterator of host batches: arrays of this process's rows, and plain ints, which are counted.

    After `restore(state())` the next batch is the one that would have followed.
    """

    def __next__(self) -> dict[str, Any]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class NonFinite(RuntimeError):
    """Loss or gradients became NaN or Inf; the message names the step and the last good checkpoint."""


class Preempted(RuntimeError):
    """SIGTERM came, and the state was saved."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of a run.

    Attributes:
        state: state after the last step.
        evaluation: numbers of the last evaluation; those of the moving average have the prefix `ema_`.
    """

    state: TrainState
    evaluation: dict[str, float]


def train(
    task: Task,
    batches: Batches,
    *,
    options: TrainOptions,
    optimizer: OptimizerOptions,
    evaluate: Callable[[Parameters], Mapping[str, float]] | None = None,
    description: Mapping[str, Any] | None = None,
    free_keys: Iterable[str] = (),
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    initial: Callable[[Parameters], Mapping[str, np.ndarray]] | None = None,
    report: Iterable[str] = (),
) -> Result:
    """Trains until `options.num_steps`, from the last good checkpoint of the workdir if there is one.

    Args:
        task: gives parameters and a loss.
        batches: a fresh iterator; `train` moves it to the batch at which the checkpoint was written.
        options: options of the run.
        optimizer: options of the optimiser.
        evaluate: parameters -> numbers; called for the parameters and for their moving average.
        description: JSON that says what the run is; kept in the checkpoints and in `config.json`. Its "config" must
            not change when a run is continued.
        free_keys: dotted keys of description["config"] that may change.
        upgrade: description of an older version -> as this version writes it.
        initial: abstract parameters -> path -> array; these arrays replace fresh ones. Not called on resuming.
        report: lines to print first, such as what the model's layers run on.

    Raises:
        ValueError: options contradict each other or the run that is continued.
        FolderInUse: another run holds the workdir.
        CheckpointError: checkpoints cannot be written, or none can be read.
        NonFinite: loss or gradients are NaN or Inf.
        Preempted: SIGTERM came, and the state was saved.
    """
    description = records.plain(description or {}, "description")
    mesh = make_mesh(options.mesh)
    check_batch_size("batch_size", options.batch_size, mesh, accumulate=options.accumulate)
    transform = make_optimizer(optimizer, num_steps=options.num_steps, batch_size=options.batch_size)
    make = functools.partial(initial_state, task.init, transform, seed=options.seed, keep_ema=optimizer.ema_decay > 0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder_lock.hold(options.workdir, "training"))
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(options.workdir, keep=options.keep)
        stack.callback(checkpoints.close)
        shapes = jax.eval_shape(make)
        shardings = tree_shardings(shapes, mesh, fsdp=options.mesh.fsdp)
        _check_same_run(checkpoints, description, frozenset(free_keys), upgrade)
        found = checkpoints.restore(_abstract(shapes, shardings))
        state = found[0] if found else _start(make, shapes, shardings, initial)
        means, step = Means(), int(jax.device_get(state.step))
        if found:
            batches.restore(found[1]["progress"]["batches"])
            means.restore(found[1]["progress"]["means"])
        primary = jax.process_index() == 0
        if primary:
            records.write_config(options.workdir, description)
        metrics = Metrics(options.workdir, step=step, active=primary)
        stack.callback(metrics.close)
        for line in [*_first_lines(mesh, options, shapes.params), *report]:
            metrics.say(line)
        if step:
            metrics.say(f"resuming at step {step}")
        run = _Run(options, mesh, checkpoints, metrics, means, batches, description, evaluate)
        return run.go(make_step(task.loss, transform, optimizer, options, shardings, mesh), state, step)


class _Run:
    """The parts of a run that stay the same from step to step."""

    def __init__(
        self,
        options: TrainOptions,
        mesh: Mesh,
        checkpoints: Checkpoints,
        metrics: Metrics,
        means: Means,
        batches: Batches,
        description: Mapping[str, Any],
        evaluate: Callable[[Parameters], Mapping[str, float]] | None,
    ):
        self.options, self.mesh, self.checkpoints, self.metrics = options, mesh, checkpoints, metrics
        self.means, self.batches, self.description, self.evaluate = means, batches, description, evaluate
        self.clock = Clock(options.batch_size)
        self.learning_rate = 0.0
        # Steps whose numbers the host has not read yet: it stays one step ahead of the device.
        self.pending: collections.deque[tuple[int, dict[str, jax.Array], dict[str, int]]] = collections.deque()

    def go(
        self, train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]], state: TrainState, step: int
    ) -> Result:
        options, evaluation = self.options, {}
        # The run may have been cut off after a checkpoint and before the evaluation of the same step.
        if step and options.due("evaluate", step) and (step == options.num_steps or not self.metrics.evaluated(step)):
            evaluation = self.evaluated(state, step)
        with StopSignal() as stop, Profile(options) as profile:
            while step < options.num_steps:
                profile.before(step)
                batch = next(self.batches)
                arrays = {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}
                counts = {name: int(value) for name, value in batch.items() if name not in arrays}
                placed = place_batch(arrays, self.mesh)
                with jax.transfer_guard("disallow"):
                    state, values = train_step(state, placed)
                step += 1
                self.pending.append((step, values, counts))
                self.settle(keep=1)
                self.clock.tick()
                self.checkpoints.check()
                profile.after(step, values)
                if options.due("log", step):
                    self.log(step)
                stopping = stop.asked(step)
                if stopping or options.due("checkpoint", step):
                    self.save(state)
                if stopping and step < options.num_steps:
                    self.checkpoints.wait()
                    raise Preempted(f"SIGTERM: stopped after step {step}; {self.checkpoints.last_good()}")
                if options.due("evaluate", step):
                    evaluation = self.evaluated(state, step)
        self.checkpoints.wait()
        return Result(state, evaluation)

    def settle(self, keep: int) -> None:
        """Reads the numbers of all but the last `keep` steps and checks them."""
        while len(self.pending) > keep:
            step, values, counts = self.pending.popleft()
            numbers = {name: float(value) for name, value in jax.device_get(values).items()}
            for name in ("loss", "grad_norm"):
                if not math.isfinite(numbers[name]):
                    self.checkpoints.wait()
                    raise NonFinite(f"{name} is {numbers[name]} at step {step}; {self.checkpoints.last_good()}")
            self.learning_rate = numbers.pop("learning_rate")
            self.means.add(numbers, counts)

    def log(self, step: int) -> None:
        """Reports the steps since the last report."""
        self.settle(keep=0)
        speed = self.clock.take()
        numbers = self.means.take() | {"learning_rate": self.learning_rate, "images_per_second": speed}
        self.metrics.write("train", step, numbers)
        left = (self.options.num_steps - step) * self.options.batch_size / speed if speed else math.nan
        shown = [f"{name} {value:.4g}" for name, value in numbers.items() if name != "images_per_second"]
        eta = duration(left) if math.isfinite(left) else "?"
        self.metrics.say(f"step {step}/{self.options.num_steps}  {'  '.join(shown)}  {speed:.1f} images/s  ETA {eta}")

    def save(self, state: TrainState) -> None:
        """Starts to write a checkpoint, after the numbers of its step were found finite."""
        self.settle(keep=0)
        started = time.perf_counter()
        progress = {"batches": self.batches.state(), "means": self.means.state()}
        self.checkpoints.save(state, self.description, progress)
        self.clock.pause(time.perf_counter() - started)

    def evaluated(self, state: TrainState, step: int) -> dict[str, float]:
        """Evaluates parameters and moving average, and reports."""
        if self.evaluate is None:
            return {}
        self.settle(keep=0)
        started = time.perf_counter()
        numbers = dict(self.evaluate(state.params))
        if state.ema is not None:
            numbers |= {f"ema_{name}": value for name, value in self.evaluate(state.ema).items()}
        seconds = time.perf_counter() - started
        self.clock.pause(seconds)
        if not self.metrics.evaluated(step):
            self.metrics.write("evaluation", step, numbers)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.metrics.say(f"evaluation at step {step}: {shown}  ({seconds:.1f} s)")
        return numbers


def _check_same_run(
    checkpoints: Checkpoints,
    description: Mapping[str, Any],
    free: frozenset[str],
    upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    newest = checkpoints.newest_record()
    if newest is None:
        return
    if newest["progress"] == {}:
        raise ValueError(f"workdir: {checkpoints.folder.parent} holds parameters without a run to continue")
    before = upgrade(newest["description"]) if "config" in newest["description"] else {}
    changed = records.changed_keys(before.get("config", {}), description.get("config", {}), free)
    if changed:
        raise ValueError(
            f"workdir: {checkpoints.folder.parent} holds another run; "
            f"use a new folder or the former values: {', '.join(changed)}"
        )


def _abstract(shapes: TrainState, shardings: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _start(
    make: Callable[[], TrainState],
    shapes: TrainState,
    shardings: TrainState,
    initial: Callable[[Parameters], Mapping[str, np.ndarray]] | None,
) -> TrainState:
    state = jax.jit(make, out_shardings=shardings)()
    if initial is None:
        return state
    given = initial(shapes.params)
    places = leaves_by_path(shardings.params)
    given = {path: place_tree(leaf, places[path]) for path, leaf in given.items()}
    paths = list(leaves_by_path(state.params))
    leaves, treedef = jax.tree.flatten(state.params)
    params = jax.tree.unflatten(treedef, [given.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])
    ema = jax.tree.map(lambda leaf: leaf.copy(), params) if state.ema is not None else None
    return dataclasses.replace(state, params=params, ema=ema)


def _first_lines(mesh: Mesh, options: TrainOptions, params: Parameters) -> list[str]:
    kinds = collections.Counter(device.device_kind for device in mesh.devices.flat)
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return [
        f"devices: {devices} ({jax.default_backend()}); processes: {jax.process_count()}",
        f"mesh: {axes}; fsdp {'on' if options.mesh.fsdp else 'off'}",
        f"parameters: {parameter_count(params):,}",
    ]
