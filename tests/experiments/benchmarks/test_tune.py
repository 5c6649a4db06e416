"""The program that fills the files of measured times, in its dry form: interpreted kernels on a tiny map."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.benchmarks import tune
from experiments.benchmarks.search import Search
from experiments.benchmarks.shapes import select
from pallas_kernels.choices import VARIANTS
from pallas_kernels.mosaic.tiles import Tile


def tune_tiny(folder, name: str, **options) -> list[dict[str, Any]]:
    """Tunes the forward pass of a tiny map of this kind."""
    (shape,) = select([name])
    search = Search(tune.show, folder, {"commit": "c"}, clock="host", dry=True)
    return tune.tune(tune.tiny(shape), search, SimpleNamespace(modes=["inference"], dtype="bfloat16", **options))


@pytest.mark.full
def test_the_fastest_tile_of_a_scan_enters_the_file_that_plans_read(tmp_path):
    rows = tune_tiny(tmp_path, "table1_128_b1_c32", what=["tiles"], directions=["down"], num_tiles=1)
    table = json.loads((tmp_path / "dry.json").read_text())
    ((key, fields),) = table["tiles"].items()
    assert key.startswith("kernel=forward batch=1 lines=2 length=2")
    assert fields.pop("milliseconds") == min(row["milliseconds"] for row in rows)
    assert Tile(**fields).extent >= 2 and table["about"] == {"card": "dry", "commit": "c"}


@pytest.mark.full
def test_variants_of_a_layer_enter_one_row(tmp_path, capsys):
    tune_tiny(tmp_path, "gspn_t_stage4", what=["variants"])
    (row,) = json.loads((tmp_path / "dry.json").read_text())["propagations"]
    assert row["shape"] == [1, 2, 2, 8] and row["rank"] == 8
    assert set(row["milliseconds"]["inference"]) == set(VARIANTS)
    assert "gspn_t_stage4 low_rank inference timed: " in capsys.readouterr().out


def test_a_dry_run_never_enters_the_repository(command):
    with pytest.raises(ValueError, match="folder: expected one where --dry is given"):
        command(tune, "--dry", "--shapes=gspn_t_stage4")
