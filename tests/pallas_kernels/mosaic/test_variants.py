"""Which kernel variants a propagation runs: the fastest that fit, as measured or estimated, or a named one."""

import dataclasses
import math

import pytest

from pallas_kernels.choices import VARIANTS, Variants
from pallas_kernels.mosaic import card, measured, variants
from pallas_kernels.mosaic.variants import MODES, Propagation

STAGE = Propagation((128, 14, 14, 576), "bfloat16", 576, None, 8)  # stage 3 of GSPN-T


@pytest.fixture(autouse=True)
def on_a_card(tmp_path, monkeypatch):
    """An H200 of which nothing was measured."""
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    variants._fastest_of.cache_clear()
    with card.assume(card.H200):
        yield
    variants._fastest_of.cache_clear()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 200, 24), (1, 2048, 16, 8), (500, 7, 7, 8), (1, 64, 64, 2048)])
@pytest.mark.parametrize("rank", [3, 160, 1024])
def test_any_map_has_variants_that_fit_it(shape, rank):
    propagation = Propagation(shape, "bfloat16", shape[-1], 3, rank)
    chosen = variants.choose(propagation, None)
    for mode in MODES:
        times = {variant: variants.seconds(propagation, variant, mode) for variant in VARIANTS}
        known = {variant: time for variant, time in times.items() if time is not None}
        assert getattr(chosen, mode) == min(known, key=lambda variant: known[variant])
        assert all(0 < time < math.inf for time in known.values()) and "scans" in known


def test_measured_times_come_before_the_estimate(tmp_path):
    slow = variants.choose(STAGE, None).inference
    assert variants.basis(STAGE) == "estimated for an NVIDIA H200, not measured"
    times = {"inference": {variant: 2.0 if variant == slow else 1.0 for variant in VARIANTS}}
    measured.add(card.H200.name, propagation=dataclasses.asdict(STAGE), milliseconds=times, folder=tmp_path)
    variants._fastest_of.cache_clear()
    assert variants.choose(STAGE, None).inference != slow
    assert variants.basis(STAGE) == "measured on an NVIDIA H200"


def test_a_named_variant():
    propagation = Propagation((2, 16, 16, 64), "bfloat16", 64, None, 8)
    assert variants.choose(propagation, "scans") == Variants("scans", "scans", "scans")
    assert variants.choose(propagation, "low_rank_on_chip") == Variants(
        "low_rank_on_chip", "low_rank_on_chip", "low_rank"
    )
    with pytest.raises(
        ValueError, match="variant: expected one that fits NVIDIA H200 and x .2, 128, 128, 64.*'low_rank_on_chip'"
    ):
        variants.choose(dataclasses.replace(propagation, shape=(2, 128, 128, 64)), "low_rank_on_chip")


def test_a_card_without_wgmma_reads_maps():
    with card.assume(card.Card("NVIDIA B200", (10, 0), 148, 227 * 1024)):
        assert variants.choose(STAGE, None) == Variants("scans", "scans", "scans")
        with pytest.raises(ValueError, match="one without wgmma, which NVIDIA B200 lacks, got 'low_rank'"):
            variants.choose(STAGE, "low_rank")


def test_a_variant_that_fits_only_forward_scans_backward():
    propagation = Propagation((1, 16, 16, 64), "bfloat16", 64, None, rank=600)
    assert variants.choose(propagation, "low_rank") == Variants("low_rank", "low_rank", "scans")
    with pytest.raises(ValueError, match=r"x \(1, 16, 16, 64\) bfloat16, proxy of 1024 channels, got 'low_rank'"):
        variants.choose(dataclasses.replace(propagation, rank=1024), "low_rank")
