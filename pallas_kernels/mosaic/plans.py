"""Which tile a launch takes."""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

from pallas_kernels.mosaic import estimate, measured
from pallas_kernels.mosaic.card import Card
from pallas_kernels.mosaic.tiles import Problem, Tile, lines_of_product


def candidates(problem: Problem, card: Card, most_warpgroups: int = 4) -> list[Tile]:
    """All tiles that fit `problem` on `card`."""
    several = [problem.chunks] if problem.resident else sorted({1, min(4, problem.chunks), problem.chunks})
    overlaps = (True, False) if problem.rank and not problem.resident else (True,)
    least_stages = 1 if problem.resident else 2
    extents = (
        Tile(channels, rows, warpgroups, least_stages, 1, ghost, overlaps[-1], several[0])
        for channels, rows, warpgroups, ghost in itertools.product(
            (8, 16, 32, 64), (8, 16, 24, 32, 48, 64, 96, 128, 192), range(1, most_warpgroups + 1), (0, 16, 32, 64)
        )
    )
    tiles = (
        dataclasses.replace(extent, stages=stages, stores=stores, overlap=overlap, chunks=chunks)
        for extent in extents
        if problem.fits(extent, card)  # the least that it can take
        for stages, stores, overlap, chunks in itertools.product(
            (1, 2, 3, 4, 6), (1, 2), overlaps if lines_of_product(extent) == 1 else (True,), several
        )
        if stages >= least_stages
    )
    return [tile for tile in tiles if problem.fits(tile, card)]


_forced: contextvars.ContextVar[Callable[[Problem, Card], Tile | None]] = contextvars.ContextVar(
    "forced", default=lambda problem, card: None
)


@contextlib.contextmanager
def forced(choose: Callable[[Problem, Card], Tile | None]) -> Iterator[None]:
    """Launches that the block plans take the tile choose(problem, card), which must fit, unless it is None."""
    token = _forced.set(choose)
    try:
        yield
    finally:
        _forced.reset(token)


def plan(problem: Problem, card: Card, most_warpgroups: int = 4) -> Tile | None:
    """The tile that the launch takes: forced, measured, or the best by the estimate; None if no tile fits."""
    return _forced.get()(problem, card) or _planned(problem, card, most_warpgroups)


@functools.lru_cache(maxsize=4096)
def _planned(problem: Problem, card: Card, most_warpgroups: int) -> Tile | None:
    known = measured.tile(card.name, problem.key)
    if known is not None:
        tile = Tile(**{field.name: known[field.name] for field in dataclasses.fields(Tile)})
        if tile.warpgroups <= most_warpgroups and problem.fits(tile, card):
            return tile
    rates = estimate.rates(card)
    seconds = {
        tile: estimate.seconds(problem, tile, card, rates) for tile in candidates(problem, card, most_warpgroups)
    }
    if not seconds:
        return None
    best = min(seconds.values())
    # Among tiles within the estimate's precision: whole sectors of memory first, then more copies ahead, then overlap.
    near = [tile for tile in seconds if seconds[tile] <= 1.03 * best]
    return max(
        near,
        key=lambda tile: (min(tile.channels, 16), tile.stores, min(tile.stages, 4), tile.overlap, -seconds[tile]),
    )
