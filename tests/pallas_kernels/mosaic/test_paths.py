"""Which kernels a propagation takes: the table is what the program writes, and serves every map."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import choose_paths
from experiments.kernel_shapes import CHOSEN, KernelShape, select
from pallas_kernels.dispatch import PATHS, Paths
from pallas_kernels.mosaic import card, paths
from pallas_kernels.mosaic.paths import Work


@pytest.fixture(autouse=True)
def on_a_card():
    with card.assume(card.H200):
        yield


def test_each_layer_takes_the_cheapest_path_of_its_own_row():
    table = json.loads(paths.TABLE.read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert rows.keys() == {shape.name for shape in CHOSEN}
    for shape in CHOSEN:
        row, work = rows[shape.name], choose_paths.work_of(shape)
        assert paths.nearest(work)["name"] == shape.name
        chosen = paths.choose(work, None)
        assert chosen == Paths(row["inference"], row["training"], row["backward"])
        for mode in choose_paths.NAMES:
            times = row["milliseconds"][mode]
            assert times[row[mode]] == min(times.values()) and set(times) <= set(PATHS)


def test_the_table_is_what_the_program_writes():
    table = json.loads(paths.TABLE.read_text())
    if not table["basis"].startswith("estimated"):
        pytest.skip(f"{table['basis']}: times do not repeat to the digit")
    rows = {row["name"]: row for row in table["rows"]}
    for shape in select(["gspn_t", "generators", "sdxl_1k_level2", "width1152_16", "gspn_t_stage1_shared"]):
        assert choose_paths.row(shape, choose_paths.estimate(shape)) == rows[shape.name]


def test_program_writes_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(choose_paths.card, "present", lambda: "no card")
    assert choose_paths.main(["--shapes=gspn_nano_stage3", f"--out={tmp_path}/paths.json"]) == 0
    table = json.loads((tmp_path / "paths.json").read_text())
    assert table["basis"] == "estimated for an NVIDIA H200, not measured"
    assert [row["name"] for row in table["rows"]] == ["gspn_nano_stage3"]
    assert "1 maps, estimated" in capsys.readouterr().out
    assert choose_paths.main(["--shapes=gspn_nano_stage2", f"--out={tmp_path}/paths.json"]) == 0
    table = json.loads((tmp_path / "paths.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["gspn_nano_stage2", "gspn_nano_stage3"]
    (tmp_path / "paths.json").write_text(json.dumps(table | {"basis": "measured on an NVIDIA H200"}))
    assert choose_paths.main(["--shapes=gspn_nano_stage2", f"--out={tmp_path}/paths.json"]) == 1
    assert "paths.json holds times measured on an NVIDIA H200" in capsys.readouterr().err
    assert json.loads((tmp_path / "paths.json").read_text())["basis"].startswith("measured")
    with pytest.raises(SystemExit):
        choose_paths.main(["--shapes=gspn2"])
    assert "maps of layers, which have a proxy; got gspn2_1024" in capsys.readouterr().err


def test_a_path_that_does_not_fit_in_memory_has_no_time(monkeypatch, capsys):
    def by_reference(operation):
        return lambda *arrays, chunk, implementation, path: operation(*arrays, chunk=chunk, implementation="xla")

    clocked = []

    def measure(run, *, clock, seconds):
        clocked.append(run(0))
        if len(clocked) == 2:  # fused, training
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return SimpleNamespace(median_ms=float(len(clocked)), host_ms=None)

    for name in ("propagate", "propagate_low_rank"):
        monkeypatch.setattr(choose_paths, name, by_reference(getattr(choose_paths, name)))
    monkeypatch.setattr(choose_paths.device_time, "measure", measure)
    times = choose_paths.measure(KernelShape("tiny", 1, 8, 8, 16, rank=8), "host")
    assert times["inference"]["fused"] == 1 and set(times["inference"]) == set(PATHS)
    assert set(times["training"]) == set(PATHS) - {"fused"} and set(times["backward"]) == {"low_rank"}
    assert times["backward"]["low_rank"] == 1  # the whole, a call later, less the forward pass
    assert "tiny: training by fused does not fit in memory" in capsys.readouterr().out


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
