"""Which implementation of an operation runs, and why."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator

import jax

from pallas_kernels.mosaic import card

# dtypes of the arrays that the Mosaic kernels take.
_MOSAIC_DTYPES = frozenset(("float32", "bfloat16", "float16"))


# Of a propagation by Mosaic kernels. fused: maps in memory, one launch a direction; low_rank: made by the kernel, of a
# proxy; on_chip: one launch for all directions, x and y in shared memory.
PATHS = ("fused", "fused_on_chip", "low_rank", "low_rank_on_chip")


@dataclasses.dataclass(frozen=True)
class Paths:
    """Which kernels a propagation takes: names of `PATHS`."""

    inference: str
    training: str  # forward, when the four h are kept
    backward: str  # "fused" or "low_rank"

    def forward(self, keep: bool) -> str:
        return self.training if keep else self.inference

    def __str__(self) -> str:
        return f"{self.inference}; in training {self.training}, backward {self.backward}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One decision, made while an operation was traced."""

    operation: str
    shape: tuple[int, ...]  # of x: (B, H, W, C)
    chunk: int | None
    implementation: str
    reason: str
    paths: Paths | None = None  # of a propagation by Mosaic kernels
    layer: str | None = None  # the innermost `named_layer` around the call


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
    return _recorded(_choice(operation, implementation, shape, chunk, dtypes)).implementation


def choose_propagation(
    operation: str,
    implementation: str | None,
    path: str | None,
    x: jax.Array,
    dtypes: Collection[str],
    chunk: int | None,
    *,
    weight_channels: int,
    rank: int | None = None,
) -> Choice:
    """As `choose`, with the paths of the kernels; `rank`: of the proxy, if there is one.

    Raises:
      ValueError: besides, `path` is not a known name, or cannot run.
    """
    choice = _choice(operation, implementation, x.shape, chunk, dtypes)
    known = PATHS[: 2 if rank is None else 4]
    if path is not None and path not in known:
        raise ValueError(f"path: expected None or one of {', '.join(known)}; got {path!r}")
    if not choice.implementation.startswith("mosaic"):
        if path is not None:
            raise ValueError(f"path: expected None where `{choice.implementation}` runs, got {path!r}")
        return choice if rank else _recorded(choice)  # `propagate` records what a proxy's maps are given to
    from pallas_kernels.mosaic import paths  # here, since importing Pallas takes a second

    is_interpreted = choice.implementation == "mosaic_interpret"
    widest = max(dtypes, key=lambda name: jax.numpy.dtype(name).itemsize)  # what fits with it fits with the others
    work = paths.Work(x.shape, widest, weight_channels, chunk, rank or 0)
    chosen = paths.choose(work, path, is_interpreted)
    why = "path asked for" if path else f"paths {paths.basis()}"
    return _recorded(dataclasses.replace(choice, paths=chosen, reason="; ".join(filter(None, (choice.reason, why)))))


def _choice(
    operation: str, implementation: str | None, shape: tuple[int, ...], chunk: int | None, dtypes: Collection[str]
) -> Choice:
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


_layers: list[str] = []


@contextlib.contextmanager
def named_layer(name: str) -> Iterator[None]:
    _layers.append(name)
    try:
        yield
    finally:
        _layers.pop()


def _recorded(choice: Choice) -> Choice:
    choice = dataclasses.replace(choice, layer=_layers[-1] if _layers else None)
    for record in _records:
        record.append(choice)
    return choice


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
