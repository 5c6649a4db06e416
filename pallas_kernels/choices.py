"""The record of choices: which implementation and kernel variants an operation took when it was traced."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

# How Mosaic kernels run a propagation. "scans": four line scans of maps in memory, then one pass that gates and merges
# them; the only one where the maps are given. "low_rank": the kernel makes the maps from a proxy. Both launch one
# kernel for all directions. "low_rank_on_chip": likewise, and x and y stay in shared memory; forward only.
VARIANTS = ("scans", "low_rank", "low_rank_on_chip")


@dataclasses.dataclass(frozen=True)
class Variants:
    """The kernel variants that a propagation runs: names in `VARIANTS`."""

    inference: str
    training: str  # the forward pass under differentiation, which keeps h of the four directions
    backward: str  # "scans" or "low_rank"

    def forward(self, keep: bool) -> str:
        """The variant of a forward pass that keeps h, or does not."""
        return self.training if keep else self.inference

    def __str__(self) -> str:
        return f"{self.inference}; in training {self.training}, backward {self.backward}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice, made while an operation was traced."""

    operation: str
    shape: tuple[int, ...]  # (B, H, W, C) of x
    chunk: int | None
    implementation: str
    reason: str
    variants: Variants | None = None  # None unless Mosaic kernels run a propagation
    layer: str | None = None  # the innermost `named_layer` around the call


_records: list[list[Choice]] = []
_layer: contextvars.ContextVar[str | None] = contextvars.ContextVar("layer", default=None)


def record(choice: Choice) -> Choice:
    """`choice` with the name of its layer, after every open `record_choices` has taken it."""
    choice = dataclasses.replace(choice, layer=_layer.get())
    for choices in _records:
        choices.append(choice)
    return choice


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects the choices that operations make while the block traces them, in order.

    A compiled function chooses once, when it is traced, and JAX does not trace the same function twice. Trace a new one
    inside the block, for example with `jax.eval_shape(lambda x: function(x), x)`.
    """
    choices: list[Choice] = []
    _records.append(choices)
    try:
        yield choices
    finally:
        _records[:] = [other for other in _records if other is not choices]


@contextlib.contextmanager
def named_layer(name: str) -> Iterator[None]:
    """Puts `name` in `Choice.layer` of every operation that the block traces.

    The name is used while tracing only; it does not change the compiled program. In nested blocks the innermost name
    counts.
    """
    token = _layer.set(name)
    try:
        yield
    finally:
        _layer.reset(token)
