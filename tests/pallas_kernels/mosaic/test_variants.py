"""Which kernel variants a propagation runs: the table has one for every map."""

import numpy as np
import pytest

from pallas_kernels.choices import GIVEN_MAP_VARIANTS, VARIANTS, Variants
from pallas_kernels.mosaic import card, variants
from pallas_kernels.mosaic.variants import Work


@pytest.fixture(autouse=True)
def on_a_card():
    with card.assume(card.H200):
        yield


@pytest.mark.full
def test_a_row_is_good_for_similar_maps(monkeypatch):
    """Without the row of a map, the nearest other row rarely chooses a variant much slower than the best."""
    rows, slower = variants._table()["rows"], []
    for row in rows:
        monkeypatch.setattr(variants, "_table", lambda row=row: {"rows": [other for other in rows if other is not row]})
        chosen = variants.choose(variants._work_of(row), None)
        for mode in ("inference", "training", "backward"):
            times = row["milliseconds"][mode]
            slower.append(times[getattr(chosen, mode)] / min(times.values()))
    assert np.mean(np.array(slower) < 1.1) > 0.85 and np.max(slower) < 3, sorted(slower)[-20:]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 200, 24), (1, 2048, 16, 8), (500, 7, 7, 8), (1, 64, 64, 2048)])
@pytest.mark.parametrize("rank", [0, 3, 160, 1024])
def test_any_map_has_variants_that_fit_it(shape, rank):
    work = Work(shape, "bfloat16", shape[-1], 3, rank)
    chosen = variants.choose(work, None)
    for variant in (chosen.inference, chosen.training):
        assert variant in (VARIANTS if rank else GIVEN_MAP_VARIANTS)
        assert variants.forms(work, variant).tiles
    assert variants.forms(work, chosen.backward, kernel="backward").tiles


def test_a_named_variant():
    work = Work((2, 16, 16, 64), "bfloat16", 64, None, 8)
    assert variants.choose(work, "fused_on_chip") == Variants("fused_on_chip", "fused_on_chip", "fused")
    assert variants.choose(work, "low_rank_on_chip") == Variants("low_rank_on_chip", "low_rank_on_chip", "low_rank")
    with pytest.raises(
        ValueError, match="variant: expected one that fits NVIDIA H200 and x .2, 128, 128, 64.*'low_rank_on_chip'"
    ):
        variants.choose(Work((2, 128, 128, 64), "bfloat16", 64, None, 8), "low_rank_on_chip")


def test_a_card_without_wgmma_reads_maps():
    rows = [row for row in variants._table()["rows"] if row["name"] in ("gspn_t_stage1", "gspn_t_stage4")]
    with card.assume(card.Card("NVIDIA B200", (10, 0), 148, 227 * 1024)):
        for row in rows:
            chosen = variants.choose(variants._work_of(row), None)
            assert {chosen.inference, chosen.training, chosen.backward} <= {"fused", "fused_on_chip"}, chosen
        with pytest.raises(ValueError, match="one without wgmma, which NVIDIA B200 lacks, got 'low_rank'"):
            variants.choose(variants._work_of(rows[0]), "low_rank")


def test_a_variant_that_fits_only_forward_is_fused_backward():
    chosen = variants.choose(Work((1, 16, 16, 64), "bfloat16", 64, None, rank=600), "low_rank")
    assert chosen == Variants("low_rank", "low_rank", "fused")
    with pytest.raises(ValueError, match=r"x \(1, 16, 16, 64\) bfloat16, proxy of 1024 channels, got 'low_rank'"):
        variants.choose(Work((1, 16, 16, 64), "bfloat16", 64, None, rank=1024), "low_rank")
    with pytest.raises(ValueError, match="variant: expected one that fits .*, got 'fused_on_chip'"):
        variants.choose(Work((1, 128, 128, 64), "bfloat16", 64, None), "fused_on_chip")
