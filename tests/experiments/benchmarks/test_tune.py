"""The program that fills the table of measured tiles, in its dry form: two tiles, interpreted on a shrunken map."""

import json

import pytest

from experiments.benchmarks import tune
from experiments.benchmarks.scans import shrink
from experiments.benchmarks.shapes import select
from pallas_kernels.mosaic import tiles


@pytest.mark.full
def test_the_fastest_tile_enters_the_table_that_plans_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "LEAST_GAIN", -10.0)  # keep the fastest whatever it gains
    (shape,) = select(["gspn_nano_stage3"])
    found = tune.tune(shrink(shape), "down", "forward", "float32", num_tiles=2, clock="host", dry=True)
    assert found is not None
    tune.keep(tmp_path / "tiles.json", "dry", dict([found]))
    ((key, fields),) = json.loads((tmp_path / "tiles.json").read_text())["dry"].items()
    work = tiles.ScanWork.of_key(key)
    assert (work.kernel, work.batch, work.lines, work.length, work.channels) == ("forward", 2, 7, 7, 16)
    assert tiles.Tile(**fields).extent >= 7 and work.key == key
