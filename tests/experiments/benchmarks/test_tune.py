"""The program that fills the files of measured times, in its dry form: interpreted kernels on a tiny map."""

import json

import pytest

from experiments.benchmarks import tune
from pallas_kernels.mosaic.tiles import Tile


@pytest.mark.full
def test_the_fastest_tile_of_a_scan_enters_the_file_that_plans_read(tmp_path, command):
    words = ["--shapes=table1_128_b1_c32", "--directions=down", "--modes=inference", "--num_tiles=1"]
    command(tune, "--dry", f"--folder={tmp_path}", *words)
    table = json.loads((tmp_path / "dry.json").read_text())
    ((key, fields),) = table["tiles"].items()
    assert key.startswith("kernel=forward batch=1 lines=2 length=2") and fields.pop("milliseconds") > 0
    assert Tile(**fields).extent >= 2 and table["about"]["card"] == "dry" and table["propagations"] == []


@pytest.mark.full
def test_variants_of_a_layer_enter_one_row(tmp_path, command, capsys):
    command(tune, "--dry", f"--folder={tmp_path}", "--shapes=gspn_t_stage4", "--what=variants", "--modes=inference")
    (row,) = json.loads((tmp_path / "dry.json").read_text())["propagations"]
    assert row["shape"] == [1, 2, 2, 8] and row["rank"] == 8
    assert set(row["milliseconds"]["inference"]) == {"scans", "low_rank", "low_rank_on_chip"}
    assert "gspn_t_stage4 low_rank inference timed: " in capsys.readouterr().out


def test_a_dry_run_never_enters_the_repository(command):
    with pytest.raises(ValueError, match="folder: expected one where --dry is given"):
        command(tune, "--dry", "--shapes=gspn_t_stage4")
