"""The scan kernels in the interpreter, which raises if it sees a race: the results agree with the reference."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import frame
from pallas_kernels.mosaic.frame import Frame
from tests.pallas_kernels.mosaic import cases

RANDOM = 400  # cases drawn from the product, 3 seconds each; TEST_SEED=1 draws others


def quick_tile(case: cases.ScanCase) -> str | None:
    """One tile, several warpgroups, and lines cut into segments."""
    return case.tile if case.tile in ("one", "two", "cut") and case.size not in ("one line", "one pixel") else None


@pytest.mark.parametrize("case", cases.marked(cases.covering(), quick=quick_tile))
def test_covering_cases(case):
    cases.check(case, "mosaic_interpret")


@pytest.mark.random
@pytest.mark.parametrize("number", range(RANDOM))
def test_product_of_all_cases(number):
    case = list(cases.sample(RANDOM, int(os.environ.get("TEST_SEED", "0"))))[number]
    print(case)
    cases.check(case, "mosaic_interpret")


def test_covering_cases_cover_every_allowed_pair_and_are_few():
    chosen = cases.covering()
    assert len(chosen) <= 60 and len(set(chosen)) == len(chosen)
    assert all(case.is_allowed for case in chosen)
    assert set(np.unique(cases.pairs(chosen))) == set(np.unique(cases.pairs(cases.product())))
    for axis, values in cases.AXES.items():
        assert {getattr(case, axis) for case in chosen} == set(values)


def test_cut_cases_have_several_segments_and_launches():
    for case in cases.covering():
        tile, axis = case.explicit_tile, 1 if case.direction in ("down", "up") else 2
        if tile and tile.ghost:
            walk = Frame(case.shape, [case.direction], [0], case.chunk_lines, tile, reverse=False)
            assert walk.segments == 3 and walk.launches == 2, case
            assert (case.shape[axis], case.shape[3 - axis]) == (walk.lines, walk.length)


@pytest.mark.full
def test_launches_in_a_loop(monkeypatch):
    """As where there are more launches than the loop's body has: the loop runs once for each of two launches."""
    monkeypatch.setattr(frame, "_UNROLLED", 1)
    jax.clear_caches()
    case = next(case for case in cases.covering() if case.size == "long" and not case.shares)
    cases.check(case, "mosaic_interpret")


UNWRITTEN = cases.ScanCase("down", "none", "none", "float32", "logits", "tall", (1, 8), "one", (2, 2))


def test_an_element_that_no_kernel_writes_is_noticed(monkeypatch):
    """Results start as NaN in the interpreter, so a missing store cannot pass as zeros."""
    store = Frame.store

    def all_but_the_last_line(self, source, ref, axis, n, **indices):
        pl.when(n < self.count - 1)(lambda: store(self, source, ref, axis, n, **indices))

    monkeypatch.setattr(Frame, "store", all_but_the_last_line)
    jax.clear_caches()
    with pytest.raises(AssertionError, match="h: got has 56 values that are not finite, .* at \\(0, 8, 0, 0\\)"):
        cases.check(UNWRITTEN, "mosaic_interpret")
