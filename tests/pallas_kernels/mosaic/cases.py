"""The cases in which the scan kernels are compared with the reference: axes, allowed combinations, a covering set."""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import DIRECTIONS, line_scan, line_scan_from_logits
from pallas_kernels.directions import walked_axis
from pallas_kernels.mosaic.tiles import Tile
from tests.tolerances import TOLERANCES, assert_close

# Lines, and pixels of a line. "long" is cut into segments, and its lines into launches: see `ScanCase`.
SIZES = {
    "one line": (1, 9), "one pixel": (9, 1), "few lines": (3, 9), "tall": (9, 7), "wide": (6, 17), "whole": (4, 16),
    "long": None,
}  # fmt: skip
# Batch and channels: one channel block; an odd number, padded to two blocks; folded into one image; two blocks of 8 or
# one of 16.
MAPS = ((1, 8), (2, 9), (3, 1), (1, 16))
# dtypes of x, logits and lam; weights are float32.
DTYPES = {
    "float32": ("float32",) * 3, "bfloat16": ("bfloat16",) * 3, "float16": ("float16",) * 3,
    "narrow x": ("bfloat16", "float16", "float32"), "wide x": ("float32", "bfloat16", "float16"),
}  # fmt: skip
# Channels, pixels, warpgroups.
TILES = {"planned": None, "one": (8, 16, 1), "two": (8, 16, 2), "three": (8, 16, 3), "broad": (16, 8, 3), "cut": None}
AXES = {
    "direction": DIRECTIONS,
    "chunk": ("none", "divides", "ragged", "larger"),
    "sharing": ("none", "all", "eight", "too few"),  # channels that share a weight
    "dtypes": tuple(DTYPES),
    "source": ("weights", "logits"),
    "size": tuple(SIZES),
    "map": MAPS,
    "tile": tuple(TILES),
    "depth": (None, (1, 2), (2, 1), (3, 2), (4, 1)),  # stages and stores
    "chunks": (1, 2, 3),  # that a CTA walks one after the other
}


class ScanCase(NamedTuple):
    """One value of each axis, in their order, and the shapes and options that follow."""

    direction: str
    chunk: str
    sharing: str
    dtypes: str
    source: str
    size: str
    map: tuple[int, int]
    tile: str
    depth: tuple[int, int] | None
    chunks: int = 1

    def __str__(self) -> str:
        """An id for pytest: words in the order of the axes."""
        values = ("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in self)
        return "-".join(value.replace(" ", "_") for value in values)

    @property
    def shares(self) -> bool:
        return self.sharing in ("all", "eight")

    @property
    def ghost(self) -> int:
        return 32 if self.shares else 8

    @property
    def lines(self) -> int:
        size = SIZES[self.size]
        if size:
            return size[0]
        # Two launches; the second chunk of "ragged" ends in the first.
        return {"divides": 2 * (self.ghost + 1), "ragged": self.ghost + 4}.get(self.chunk, self.ghost + 1)

    @property
    def length(self) -> int:
        size = SIZES[self.size]
        return size[1] if size else 130 if self.shares else 70  # three segments, the last of them short

    @property
    def shape(self) -> tuple[int, int, int, int]:
        sizes = (self.lines, self.length) if walked_axis(self.direction) == 1 else (self.length, self.lines)
        return self.map[0], *sizes, self.map[1]

    @property
    def chunk_lines(self) -> int | None:
        if self.chunk in ("none", "larger"):
            return None if self.chunk == "none" else self.lines + 3
        if self.size == "long":
            return self.ghost + 1
        if self.chunk == "divides":
            return next(n for n in (3, 2, 1) if self.lines % n == 0 and n < max(self.lines, 2))
        return 2 if self.lines == 3 else 4 if self.lines in (6, 9) else 3

    @property
    def weight_channels(self) -> int:
        channels = self.map[1]
        too_few = {8: 2, 9: 3, 16: 4}.get(channels, 1)
        return {"none": channels, "all": 1, "eight": channels // 8, "too few": too_few}[self.sharing]

    @property
    def explicit_tile(self) -> Tile | None:
        if self.depth is None:
            return None
        if self.tile == "cut":
            return Tile(8, 128 if self.shares else 48, 1, *self.depth, self.ghost)
        extent: Any = TILES[self.tile]
        channels, rows, warpgroups = extent
        return Tile(channels, rows, warpgroups, *self.depth, chunks=self.chunks)

    @property
    def is_allowed(self) -> bool:
        """Whether the values go together, and the interpreter needs only seconds."""
        if (self.tile == "cut") != (self.size == "long") or (self.tile == "planned") != (self.depth is None):
            return False
        channels, walks_rows = self.map[1], walked_axis(self.direction) == 1
        chunk = self.chunk_lines or self.lines
        return all((
            # A CTA with ghost zones walks one chunk; where the tile is planned, the plan says how many.
            self.chunks == 1
            or (self.tile not in ("planned", "cut") and chunk < self.lines and self.chunks <= -(-self.lines // chunk)),
            self.sharing == "none" or channels > 1,
            self.sharing != "eight" or channels == 16,
            self.source == "logits" or self.dtypes != "wide x",  # weights are float32 like x
            self.chunk != "ragged" or self.lines > 1,
            self.tile != "one" or self.length <= 16,
            # A broad tile's channels share one weight; a ragged line whose pixels are neighbours gets another 8.
            not (self.tile == "broad" and self.shares)
            or (self.sharing == "all" and channels == 16 and not walks_rows and self.lines > 1),
            not (self.tile == "cut" and self.shares) or (channels % 8 == 0 and self.chunk in ("none", "larger")),
        ))  # fmt: skip

    @property
    def cost(self) -> int:
        """About CTAs times lines, with which the interpreter's time grows."""
        segments = 3 if self.size == "long" else 1
        warpgroups = (TILES[self.tile] or (0, 0, 1))[2]
        return self.map[0] * segments * self.lines * (2 if self.map[1] > 8 else 1) * warpgroups


@functools.cache
def product() -> tuple[ScanCase, ...]:
    """Every allowed case."""
    cases = itertools.starmap(ScanCase, itertools.product(*AXES.values()))
    return tuple(case for case in cases if case.is_allowed)


def sample(count: int, seed: int) -> Iterator[ScanCase]:
    """`count` different cases of the product, drawn by the seed."""
    cases = product()
    for index in np.random.default_rng(seed).permutation(len(cases))[:count]:
        yield cases[index]


def pairs(cases: Sequence[Any], axes: Mapping[str, Sequence[Any]] = AXES) -> np.ndarray:
    """The pairs that each case covers: (cases, pairs) integers, a number for each two of its values."""
    starts = np.cumsum([0, *map(len, axes.values())])
    numbers = {(k, v): starts[k] + i for k, axis in enumerate(axes.values()) for i, v in enumerate(axis)}
    values = np.array([[numbers[pair] for pair in enumerate(case)] for case in cases])
    first, second = np.triu_indices(len(axes), 1)
    return values[:, first] * starts[-1] + values[:, second]


def covering_set(cases: Sequence[Any], axes: Mapping[str, Sequence[Any]], costs: Sequence[float]) -> tuple[Any, ...]:
    """Cases in which every pair of values occurs that occurs at all: greedily, many new pairs at a low cost."""
    order = np.random.default_rng(0).permutation(len(cases))  # among equals, no value comes first
    covered, prices = pairs(cases, axes)[order], np.asarray(costs)[order]
    missing, chosen = np.zeros(covered.max() + 1, bool), []
    missing[covered] = True
    while missing.any():
        best = int(np.argmax(missing[covered].sum(axis=1) / prices))
        chosen.append(cases[order[best]])
        missing[covered[best]] = False
    return tuple(chosen)


@functools.cache
def covering() -> tuple[ScanCase, ...]:
    """Cases in which every allowed pair of values occurs."""
    return covering_set(product(), AXES, [60 + case.cost for case in product()])


def marked(cases: Sequence[Any], *, quick: Callable[[Any], Any]) -> list[Any]:
    """Parameters of a test: all cases, of which `make test` runs the cheapest one for each value of `quick`.

    Args:
        cases: with a `cost`.
        quick: gives a value for each case; a case with None is never quick.
    """
    cheapest = {quick(case): case for case in sorted(cases, key=lambda case: -case.cost)}
    cheapest.pop(None, None)
    return [
        pytest.param(case, id=str(case), marks=() if case in cheapest.values() else pytest.mark.full) for case in cases
    ]


def compiled() -> tuple[ScanCase, ...]:
    """One covering case for each tile and dtypes."""
    return tuple({(case.tile, case.dtypes): case for case in covering()}.values())


def draw(case: ScanCase) -> tuple[jax.Array, ...]:
    """x, weights or logits, lam, and the gradient that reaches h."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    dtypes = DTYPES[case.dtypes]
    weights = rng.normal(0, 3, (*case.shape[:3], 3, case.weight_channels))
    if case.source == "weights":
        weights = np.exp(weights) / np.exp(weights).sum(axis=3, keepdims=True)
    x, lam, grad = rng.normal(size=(3, *case.shape))
    of_weights = "float32" if case.source == "weights" else dtypes[1]
    return tuple(
        jnp.asarray(array, dtype)
        for array, dtype in zip((x, weights, lam, grad), (dtypes[0], of_weights, dtypes[2], dtypes[0]), strict=True)
    )


def scan_and_gradients(case: ScanCase, implementation: str) -> dict[str, jax.Array]:
    """h and the gradients of x, weights and lam."""
    operation: Any = line_scan if case.source == "weights" else line_scan_from_logits
    tile = None if implementation == "xla" else case.explicit_tile
    options = dict(direction=case.direction, chunk=case.chunk_lines, implementation=implementation, tile=tile)

    @jax.jit
    def run(x, weights, lam, grad):
        h, vjp = jax.vjp(functools.partial(operation, **options), x, weights, lam)
        return h, *vjp(grad)

    return dict(zip(("h", "x", "weights", "lam"), run(*draw(case)), strict=True))


def check(case: ScanCase, implementation: str) -> None:
    """The results of `implementation` agree with the reference; races that the interpreter finds raise."""
    got, want = scan_and_gradients(case, implementation), scan_and_gradients(case, "xla")
    # A gradient that is wider than x is made of h, which was kept in x's dtype.
    least = TOLERANCES[DTYPES[case.dtypes][0]]
    for name, reference in want.items():
        tolerance = max(least, TOLERANCES[reference.dtype.name])
        assert_close(got[name], reference, tolerance=tolerance, name=name)
