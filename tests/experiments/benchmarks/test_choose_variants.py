"""The table of variants is the one that the program writes."""

import json
from types import SimpleNamespace

import jax
import pytest

from experiments.benchmarks import choose_variants
from experiments.benchmarks.shapes import CHOSEN, KernelShape, select
from pallas_kernels.choices import VARIANTS, Variants
from pallas_kernels.mosaic import card, variants


@pytest.fixture(autouse=True)
def on_a_card():
    with card.assume(card.H200):
        yield


@pytest.mark.full
def test_each_layer_takes_the_cheapest_variant_of_its_own_row():
    table = json.loads(variants.TABLE.read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert rows.keys() == {shape.name for shape in CHOSEN}
    for shape in CHOSEN:
        row, work = rows[shape.name], choose_variants.work_of(shape)
        assert variants.nearest(work)["name"] == shape.name
        chosen = variants.choose(work, None)
        assert chosen == Variants(row["inference"], row["training"], row["backward"])
        for mode in choose_variants.MODES:
            times = row["milliseconds"][mode]
            assert times[row[mode]] == min(times.values()) and set(times) <= set(VARIANTS)


def test_the_table_is_the_one_that_the_program_writes():
    table = json.loads(variants.TABLE.read_text())
    if not table["basis"].startswith("estimated"):
        pytest.skip(f"{table['basis']}: times do not repeat to the digit")
    rows = {row["name"]: row for row in table["rows"]}
    for shape in select(["gspn_t", "generators", "sdxl_1k_level2", "width1152_16", "gspn_t_stage1_shared"]):
        assert choose_variants.row(shape, choose_variants.estimate(shape)) == rows[shape.name]


def test_rows_of_other_shapes_stay_and_estimates_never_join_measured_times(tmp_path, monkeypatch):
    monkeypatch.setattr(choose_variants.card, "present", lambda: "no card")
    path = tmp_path / "table.json"
    basis = choose_variants.update(path, select(["gspn_nano_stage3"]))
    assert basis == json.loads(path.read_text())["basis"] == "estimated for an NVIDIA H200, not measured"
    choose_variants.update(path, select(["gspn_nano_stage2"]))
    table = json.loads(path.read_text())
    assert [row["name"] for row in table["rows"]] == ["gspn_nano_stage2", "gspn_nano_stage3"]
    path.write_text(json.dumps(table | {"basis": "measured on an NVIDIA H200"}))
    with pytest.raises(ValueError, match="table.json holds times measured on an NVIDIA H200"):
        choose_variants.update(path, select(["gspn_nano_stage2"]))
    assert json.loads(path.read_text())["basis"].startswith("measured")
    choose_variants.update(path, select(["gspn_nano_stage2"]), replace=True)
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_a_variant_that_does_not_fit_in_memory_has_no_time(monkeypatch, capsys):
    clocked = []

    def measure(run, *, clock, seconds):
        clocked.append(run(0))
        if len(clocked) == 2:  # fused, training
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return SimpleNamespace(median_ms=float(len(clocked)), host_ms=None)

    for name in ("propagate", "propagate_low_rank"):
        monkeypatch.setattr(choose_variants, name, lambda x, *arrays, chunk, implementation, variant: 2 * x)
    monkeypatch.setattr(choose_variants.device_time, "measure", measure)
    times = choose_variants.measure(KernelShape("tiny", 1, 8, 8, 16, rank=8), "host")
    assert times["inference"]["fused"] == 1 and set(times["inference"]) == set(VARIANTS)
    assert set(times["training"]) == set(VARIANTS) - {"fused"} and set(times["backward"]) == {"low_rank"}
    assert times["backward"]["low_rank"] == 1  # the whole, a call later, less the forward pass
    assert "tiny: training by fused does not fit in memory" in capsys.readouterr().out
