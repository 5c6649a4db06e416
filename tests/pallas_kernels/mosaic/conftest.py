"""A fixture that chooses the kernels' tile."""

import contextlib
import dataclasses

import pytest

from pallas_kernels.mosaic import plans
from pallas_kernels.mosaic.tiles import Tile


@pytest.fixture
def planned():
    """Makes every kernel take a given tile if it fits; by the end of the test at least one must have taken it."""
    taken = []

    def use(tile: Tile | None) -> None:
        def choose(problem, card):
            if tile is None:
                return None
            # A CTA that walks all directions walks all chunks.
            one = dataclasses.replace(tile, chunks=problem.chunks) if problem.resident else tile
            if not problem.fits(one, card):
                return None
            taken.append(one)
            return one

        stack.enter_context(plans.forced(choose))
        wanted.append(tile)

    wanted: list[Tile | None] = []
    with contextlib.ExitStack() as stack:
        yield use
    assert taken or wanted in ([], [None])
