"""Which implementation of an operation runs, and why."""

import contextlib
import dataclasses
from collections.abc import Iterator

_MOSAIC_MISSING = "the Mosaic GPU kernels are not part of this version"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One decision, made while an operation was traced."""

    operation: str
    shape: tuple[int, ...]  # of x: (B, H, W, C)
    chunk: int | None
    implementation: str
    reason: str


_records: list[list[Choice]] = []


def implementations() -> dict[str, str | None]:
    """Names of the implementations, fastest first: None for one that can run here, else the reason why it cannot."""
    return {"mosaic": _MOSAIC_MISSING, "xla": None}


def choose(operation: str, implementation: str | None, shape: tuple[int, ...], chunk: int | None) -> str:
    """The implementation that runs `operation` on an x of `shape`.

    None takes the first of `implementations()` that can run. A named one that cannot run raises: nothing falls back
    unless it was asked to choose.

    Raises:
      ValueError: `implementation` is not a known name, or cannot run here (with the reason).
    """
    known = implementations()
    if implementation is None:
        name = next(candidate for candidate, reason in known.items() if reason is None)
        reason = "; ".join(f"{other}: {why}" for other, why in known.items() if why is not None)
    elif implementation not in known:
        raise ValueError(f"implementation: expected None or one of {', '.join(known)}; got {implementation!r}")
    elif known[implementation] is not None:
        raise ValueError(f"implementation: {implementation!r} cannot run here: {known[implementation]}")
    else:
        name, reason = implementation, "asked for"
    for record in _records:
        record.append(Choice(operation, tuple(shape), chunk, name, reason))
    return name


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects the choices made while the block traces operations, in order.

    Compiled functions choose once, when they are traced: trace afresh inside the block, for example with
    `jax.eval_shape`.
    """
    record: list[Choice] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records[:] = [other for other in _records if other is not record]
