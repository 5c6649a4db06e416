"""The kernels run by the interpreter, which raises where it sees a race: the reference's results in every case."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.mosaic.pipeline import Pipeline
from tests.pallas_kernels.mosaic import cases

FULL = 400  # cases of the product that a full run takes, 3 seconds each; TEST_SEED=1 takes others


@pytest.mark.parametrize("case", cases.covering(), ids=str)
def test_covering_cases(case):
    cases.check(case, "mosaic_interpret")


@pytest.mark.full
@pytest.mark.parametrize("number", range(FULL))
def test_product_of_all_cases(number):
    case = list(cases.sample(FULL, int(os.environ.get("TEST_SEED", "0"))))[number]
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
            walk = Pipeline(case.shape, case.direction, case.chunk_lines, tile, reverse=False)
            assert walk.segments == 3 and walk.launches == 2, case
            assert (case.shape[axis], case.shape[3 - axis]) == (walk.lines, walk.length)


UNWRITTEN = cases.ScanCase("down", "none", "none", "float32", "logits", "tall", (1, 8), "one", (2, 2))


def test_what_no_kernel_writes_is_seen(monkeypatch):
    """The results of the interpreter start as NaN: a store that is left out cannot pass as a zero."""
    cases.check(UNWRITTEN, "mosaic_interpret")
    store = Pipeline.store

    def all_but_the_last_line(self, source, ref, n, *slots):
        pl.when(n < self.count - 1)(lambda: store(self, source, ref, n, *slots))

    monkeypatch.setattr(Pipeline, "store", all_but_the_last_line)
    jax.clear_caches()
    with pytest.raises(AssertionError, match="h: got has 56 values that are not finite, .* at \\(0, 8, 0, 0\\)"):
        cases.check(UNWRITTEN, "mosaic_interpret")
