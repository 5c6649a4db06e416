"""A fixture that chooses the kernels' tile."""

import pytest

from pallas_kernels.mosaic import forms
from pallas_kernels.mosaic.tiles import Tile, plan


@pytest.fixture
def planned(monkeypatch):
    """Makes every kernel take a given tile if it fits; by the end of the test at least one must have taken it."""
    wanted, taken = [], []

    def use(tile: Tile | None) -> None:
        def take(work, card, *rest):
            if tile is not None and work.fits(tile, card):
                taken.append(work.kernel)
                return tile
            return plan(work, card, *rest)

        wanted.append(tile)
        monkeypatch.setattr(forms, "plan", take)

    yield use
    assert taken or wanted in ([], [None])
