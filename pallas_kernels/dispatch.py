"""Which implementation of an operation runs, and why."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator

from pallas_kernels.mosaic import card

# dtypes of the arrays that the Mosaic kernels take.
_MOSAIC_DTYPES = frozenset(("float32", "bfloat16", "float16"))


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
    """Names of the implementations, fastest first: None for one that can run here, else the reason why it cannot.

    "mosaic": the Pallas kernels, on an NVIDIA card with TMA (compute capability 9.0 and above). "xla": `lax.scan`, on
    anything. "mosaic_interpret": the same kernels run by Pallas' interpreter, which watches for races, on anything; too
    slow for more than looking, and only taken when asked for.
    """
    present = card.present()
    return {"mosaic": present if isinstance(present, str) else None, "xla": None, "mosaic_interpret": None}


def choose(
    operation: str, implementation: str | None, shape: tuple[int, ...], chunk: int | None, dtypes: Collection[str]
) -> str:
    """The implementation that runs `operation` on an x of `shape`, with arrays of `dtypes`.

    None takes the first of `implementations()` that can run. A named one that cannot run raises: nothing falls back
    unless it was asked to choose.

    Raises:
      ValueError: `implementation` is not a known name, or cannot run here (with the reason).
    """
    known = implementations()
    unknown_dtypes = sorted(set(dtypes) - _MOSAIC_DTYPES)
    if unknown_dtypes:
        reason = f"the kernels take {', '.join(sorted(_MOSAIC_DTYPES))}, not {', '.join(unknown_dtypes)}"
        known = {name: reason if name.startswith("mosaic") else why for name, why in known.items()}
    if implementation is None:
        name = next(candidate for candidate, reason in known.items() if reason is None)
        reason = "; ".join(f"{other}: {why}" for other, why in known.items() if why and other != "mosaic_interpret")
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
