"""What the benchmark of the kernels runs: a contender at a shape, in a direction, dtype and pass, as a program."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.kernel_contenders import Contender, bind
from experiments.kernel_goals import GOAL_SHAPES
from experiments.kernel_shapes import KernelShape

DIRECTIONS = ("down", "right", "up", "left")
# Forward: inputs to result. Backward: what the forward pass kept and a gradient, to the gradients of the inputs. Both:
# one program from inputs and gradient to result and gradients.
PASSES = ("forward", "backward", "both")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to be."""

    contender: Contender
    shape: KernelShape
    direction: str  # "" for attention
    chunk: int | None
    dtype: str
    pass_: str

    @property
    def whole(self) -> "Case":
        """The case that gives result and all gradients."""
        return dataclasses.replace(self, pass_="both")

    def __str__(self) -> str:
        words = (self.shape.name, self.direction, self.dtype, self.pass_, self.contender.name)
        return " ".join(word for word in words if word)


def make_cases(
    shapes: Sequence[KernelShape],
    contenders: Sequence[Contender],
    *,
    directions: Sequence[str] = DIRECTIONS,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    passes: Sequence[str] = PASSES,
) -> list[Case]:
    """All combinations, in the order in which time is best spent.

    The shapes that goals name come first; then the directions as they are given; in each, all of the first contender
    before the others. The rest is in the order given: by dtype, shape, pass and contender.
    """
    cases = {}  # attention has no direction: its cases coincide
    for direction in directions:
        for dtype in dtypes:
            for shape in shapes:
                for pass_ in passes:
                    for one in contenders:
                        walked = (direction, shape.chunk) if one.scans else ("", None)
                        cases.setdefault(Case(one, shape, *walked, dtype, pass_), directions.index(direction))

    def order(case: Case) -> tuple[bool, int, bool]:
        return case.shape.name not in GOAL_SHAPES, cases[case], case.contender != contenders[0]

    return sorted(cases, key=order)


def shrink(shape: KernelShape) -> KernelShape:
    """The same kind of map in a few lines, for a CPU and for sanitizers."""
    channels = min(shape.channels, 16)
    return dataclasses.replace(
        shape,
        batch=min(shape.batch, 2),
        height=min(shape.height, 9),
        width=min(shape.width, 11),
        channels=channels,
        weight_channels=channels if shape.weight_channels == shape.channels else 1,
    )


def arguments(case: Case, inputs: Sequence[jax.Array]) -> tuple[Any, ...]:
    """What the case's program takes, of the operation's inputs and, last, a gradient of its result."""
    if case.pass_ == "forward":
        return tuple(inputs[:-1])
    if case.pass_ == "both":
        return tuple(inputs)
    return _residuals(dataclasses.replace(case, pass_=""))(*inputs[:-1]), inputs[-1]


def program(case: Case) -> Callable[..., Any]:
    """The function of `arguments` that is compiled and timed."""
    function = bind(case.contender, case.direction, case.chunk)
    if case.pass_ == "forward":
        return function
    if case.pass_ == "backward":
        return lambda pull, gradient: pull(gradient)

    return with_gradients(function)


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """From the function's inputs and, last, a gradient of its result, to the result and the inputs' gradients."""

    def both(*inputs_and_gradient):
        result, pull = jax.vjp(function, *inputs_and_gradient[:-1])
        return result, pull(inputs_and_gradient[-1])

    return both


@functools.lru_cache(maxsize=4)
def _residuals(case: Case) -> Callable[..., Any]:
    """Inputs to the function from gradients to gradients, which holds what the forward pass kept."""
    function = bind(case.contender, case.direction, case.chunk)
    return jax.jit(lambda *inputs: jax.vjp(function, *inputs)[1])
