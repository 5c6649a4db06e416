"""One pass of a propagation or of a line scan as a program: its inputs, what is right, its launches, and its time."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import device_time, gate
from experiments.benchmarks.gate import Verdict
from experiments.benchmarks.measurement import ROTATED_BYTES, normal, with_gradients
from experiments.benchmarks.shapes import KernelShape
from pallas_kernels import UpProjection, line_scan_from_logits, propagate_low_rank
from pallas_kernels.mosaic import card, plans
from pallas_kernels.mosaic.card import Card
from pallas_kernels.mosaic.tiles import Problem, Tile
from pallas_kernels.tolerances import card_tolerances

# inference: y. training: y and what the gradient needs. backward: from these and a gradient to the gradients.
MODES = ("inference", "training", "backward")
MOST_SETS = 8  # of inputs in rotation, so that the cache is not measured

Choose = Callable[[Problem, Card], Tile | None]


def as_planned(problem: Problem, card: Card) -> None:
    """The choice of `plans.forced` that leaves every launch its planned tile."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """A pass over a map.

    Attributes:
        shape: the map; a propagation needs its rank.
        mode: one of `MODES`.
        variant: of a propagation's kernels; None for the one that it chooses.
        direction: of a line scan from logits; None for a propagation.
        implementation: of `pallas_kernels`.
        dtype: of all inputs but merge.
    """

    shape: KernelShape
    mode: str = "inference"
    variant: str | None = None
    direction: str | None = None
    implementation: str = "mosaic"
    dtype: str = "bfloat16"

    def columns(self) -> dict[str, Any]:
        """Returns what names the pass in a row of results."""
        named = {key: getattr(self, key) for key in ("mode", "variant", "direction", "implementation", "dtype")}
        return {"shape": self.shape.name} | {key: value for key, value in named.items() if value is not None}

    def reference(self) -> "Pass":
        return dataclasses.replace(self, implementation="xla", variant=None)

    def function(self) -> Callable[..., jax.Array]:
        """Returns y, or h of a line scan, as a function of `inputs` without the last."""
        options: Any = dict(chunk=self.shape.chunk, implementation=self.implementation)
        if self.direction is not None:
            return functools.partial(line_scan_from_logits, direction=self.direction, **options)
        return functools.partial(propagate_low_rank, variant=self.variant, **options)

    def inputs(self, key: jax.Array) -> tuple[Any, ...]:
        """Returns x, proxy, up and merge, or x, logits and lam; and last a gradient of the result."""
        shape, keys = self.shape, jax.random.split(key, 7)
        pixels = shape.batch, shape.height, shape.width
        draw = functools.partial(normal, dtype=self.dtype)
        x, grad = (draw(k, (*pixels, shape.channels)) for k in keys[:2])
        if self.direction is not None:
            return x, draw(keys[2], (*pixels, 3, shape.weight_channels)), draw(keys[3], x.shape), grad
        # Projections of variance 1 / rank make maps of variance 1.
        columns = (4, 3, shape.weight_channels), *[(4, shape.channels)] * 3
        scale = jnp.asarray(shape.rank**-0.5, self.dtype)
        up = (scale * draw(k, (shape.rank, *size)) for k, size in zip(keys[3:], columns, strict=True))
        return x, draw(keys[2], (*pixels, shape.rank)), UpProjection(*up), jnp.linspace(0.5, 1.5, 4), grad

    def arguments(self, inputs: tuple[Any, ...], choose: Choose = as_planned) -> tuple[Any, ...]:
        """Returns the arguments of `program` from `inputs`; a backward pass gets what a forward pass kept."""
        if self.mode != "backward":
            return inputs[:-1]
        with plans.forced(choose):
            return jax.jit(lambda *of_y: jax.vjp(self.function(), *of_y)[1])(*inputs[:-1]), inputs[-1]

    def program(self) -> Callable[..., Any]:
        if self.mode == "backward":
            return lambda pull, grad: pull(grad)
        if self.mode == "training":
            return lambda *of_y: jax.vjp(self.function(), *of_y)
        return self.function()

    def compiled(self, arguments: tuple[Any, ...], choose: Choose = as_planned) -> jax.stages.Compiled:
        """Compiles the program; launches take the tiles that `choose` names.

        Raises:
            ValueError: the variant cannot run this map.
        """
        with plans.forced(choose):
            return jax.jit(self.program()).lower(*arguments).compile()

    def launches(self, arguments: tuple[Any, ...]) -> dict[Problem, Tile]:
        """Returns the planned tile of each kernel that the pass launches."""
        problems = []

        def note(problem: Problem, card: Card) -> None:
            problems.append(problem)

        program = self.program()
        with plans.forced(note):
            jax.eval_shape(lambda *given: program(*given), *arguments)
        planned = {problem: plans.plan(problem, card.planned_for()) for problem in problems}
        return {problem: tile for problem, tile in planned.items() if tile is not None}

    def right_results(self, inputs: tuple[Any, ...]) -> Any:
        """Returns what the reference makes of `inputs`, to `judge` by: y, or the gradients of a backward pass."""
        function = with_gradients(self.reference().function())
        if self.mode != "backward":
            return jax.jit(self.reference().function())(*inputs[:-1])
        return jax.jit(lambda *given: function(*given)[1])(*inputs)

    def judge(self, found: Any, right: Any) -> Verdict:
        """Compares the program's results with `right_results` of the same inputs."""
        found = jax.tree.leaves(found)[:1] if self.mode == "training" else jax.tree.leaves(found)
        names = [jax.tree_util.keystr(path) or "y" for path, _ in jax.tree.leaves_with_path(right)]
        tolerance = card_tolerances(made_maps=self.direction is None)[self.dtype]
        errors = dict(zip(names, _ratios(found, jax.tree.leaves(right)), strict=True))
        # A gradient passes one rounding more than the result.
        return gate.judge(errors, dict.fromkeys(errors, tolerance * (1 + (self.mode == "backward"))), "")

    def time(self, compiled: jax.stages.Compiled, sets: list[tuple[Any, ...]], **how: Any) -> dict[str, Any]:
        """Returns the times of the compiled program on `sets` of arguments in turn; `how` as `device_time.measure`."""
        timing = device_time.measure(lambda index: compiled(*sets[index % len(sets)]), **how)
        times = {key: value for key, value in dataclasses.asdict(timing).items() if value is not None}
        return times | {"milliseconds": timing.host_ms if timing.median_ms is None else timing.median_ms}


def number_of_sets(arguments: tuple[Any, ...]) -> int:
    """Returns how many sets of such arguments exceed the cache."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments))
    return max(1, min(MOST_SETS, math.ceil(ROTATED_BYTES / size)))


@jax.jit
def _ratios(found: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return [gate.rms_ratio(one, other) for one, other in zip(found, right, strict=True)]
