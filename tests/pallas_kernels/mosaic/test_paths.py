"""Which kernels a propagation takes: the table serves every map."""

import numpy as np
import pytest

from pallas_kernels.dispatch import PATHS, Paths
from pallas_kernels.mosaic import card, paths
from pallas_kernels.mosaic.paths import Work


@pytest.fixture(autouse=True)
def on_a_card():
    with card.assume(card.H200):
        yield


def test_a_row_serves_its_neighbours(monkeypatch):
    """Each map without its own row: what the nearest other one says is rarely much slower than the best."""
    rows, slower = paths._table()["rows"], []
    for row in rows:
        monkeypatch.setattr(paths, "_table", lambda row=row: {"rows": [other for other in rows if other is not row]})
        chosen = paths.choose(paths._work_of(row), None)
        for mode in ("inference", "training", "backward"):
            times = row["milliseconds"][mode]
            slower.append(times[getattr(chosen, mode)] / min(times.values()))
    assert np.mean(np.array(slower) < 1.1) > 0.85 and np.max(slower) < 3, sorted(slower)[-20:]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 200, 24), (1, 2048, 16, 8), (500, 7, 7, 8), (1, 64, 64, 2048)])
@pytest.mark.parametrize("rank", [0, 3, 160, 1024])
def test_any_map_has_paths_that_serve_it(shape, rank):
    work = Work(shape, "bfloat16", shape[-1], 3, rank)
    chosen = paths.choose(work, None)
    for path in (chosen.inference, chosen.training):
        assert path in PATHS[: 4 if rank else 2]
        assert paths.forms(work, path).tiles
    assert paths.forms(work, chosen.backward, kernel="backward").tiles


def test_a_path_that_is_asked_for():
    work = Work((2, 16, 16, 64), "bfloat16", 64, None, 8)
    assert paths.choose(work, "fused_on_chip") == Paths("fused_on_chip", "fused_on_chip", "fused")
    assert paths.choose(work, "low_rank_on_chip") == Paths("low_rank_on_chip", "low_rank_on_chip", "low_rank")
    with pytest.raises(ValueError, match="path: 'low_rank_on_chip' has no tile on NVIDIA H200 for x .2, 128, 128, 64"):
        paths.choose(Work((2, 128, 128, 64), "bfloat16", 64, None, 8), "low_rank_on_chip")


def test_a_card_without_wgmma_reads_maps():
    rows = [row for row in paths._table()["rows"] if row["name"] in ("gspn_t_stage1", "gspn_t_stage4")]
    with card.assume(card.Card("NVIDIA B200", (10, 0), 148, 227 * 1024)):
        for row in rows:
            chosen = paths.choose(paths._work_of(row), None)
            assert {chosen.inference, chosen.training, chosen.backward} <= {"fused", "fused_on_chip"}, chosen
        with pytest.raises(ValueError, match="path: 'low_rank' expects a card with wgmma, .*, got NVIDIA B200"):
            paths.choose(paths._work_of(rows[0]), "low_rank")


def test_a_path_that_serves_forward_alone_is_fused_backward():
    chosen = paths.choose(Work((1, 16, 16, 64), "bfloat16", 64, None, rank=600), "low_rank")
    assert chosen == Paths("low_rank", "low_rank", "fused")
    with pytest.raises(ValueError, match=r"path: 'low_rank' has no tile .* x \(1, 16, 16, 64\) .* proxy of 1024"):
        paths.choose(Work((1, 16, 16, 64), "bfloat16", 64, None, rank=1024), "low_rank")
    with pytest.raises(ValueError, match="path: 'fused_on_chip' has no tile"):
        paths.choose(Work((1, 128, 128, 64), "bfloat16", 64, None), "fused_on_chip")
