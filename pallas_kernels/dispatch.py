"""Which implementation runs an operation, and why."""

from collections.abc import Collection

from pallas_kernels.choices import Choice
from pallas_kernels.mosaic import card

# dtypes of the arrays that the Mosaic kernels take.
_MOSAIC_DTYPES = frozenset(("float32", "bfloat16", "float16"))


def implementations() -> dict[str, str | None]:
    """Names of the implementations, fastest first, each with None if it can run on this machine, else the reason.

    "mosaic" runs the Pallas kernels, on an NVIDIA GPU with TMA (compute capability 9.0 and above). "xla" runs
    `lax.scan` on any device. "mosaic_interpret" runs the same kernels in Pallas' interpreter, which checks for races,
    on any device; it is for tests, slow, and only taken when it is named.
    """
    present = card.present()
    return {"mosaic": present if isinstance(present, str) else None, "xla": None, "mosaic_interpret": None}


def choose(
    operation: str, implementation: str | None, shape: tuple[int, ...], chunk: int | None, dtypes: Collection[str]
) -> Choice:
    """The implementation that runs `operation`; the caller records the choice (`choices.record`).

    Args:
        operation: its public name.
        implementation: None takes the first of `implementations()` that can run. A named one that cannot run raises:
            it is never replaced by another.
        shape: (B, H, W, C) of x.
        chunk: lines after which the scan restarts, or None.
        dtypes: names of all arrays' dtypes.

    Raises:
        ValueError: `implementation` is not a known name, or cannot run (with the reason).
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
    return Choice(operation, tuple(shape), chunk, name, reason)
