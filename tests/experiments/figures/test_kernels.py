import pytest

from experiments import tables
from experiments.benchmarks import mixers
from experiments.benchmarks.kernels import COLUMNS
from experiments.figures import kernels


def row(**values):
    columns = {**dict.fromkeys(COLUMNS), "status": "timed", "batch": 2, "height": 64, "width": 64, "channels": 640}
    columns |= {"weight_channels": 640, "direction": "down", "dtype": "bfloat16", "pass": "forward", "bytes": 10**8}
    columns |= {"candidate": "mosaic", "shape": "sdxl_1k_level1", "median_ms": 1.0, "host_ms": 1.0, "share": 0.95}
    return {**columns, **values}


def test_figure_and_table(tmp_path):
    rows = [
        row(gb_per_s=4000.0),
        row(direction="right", median_ms=3.0),
        row(candidate="xla", median_ms=30.0, host_ms=20.0),
        row(candidate="flash_attention", direction="", median_ms=7.0),
        row(shape="sdxl_16k_level1", height=512, width=1024, median_ms=9.0),
        row(status="failed", median_ms=None),
    ]
    tables.write(tmp_path / "run.csv", rows, COLUMNS, {"hardware": "1 x NVIDIA H200", "kind": "timed"})
    about, read = kernels.read(str(tmp_path / "run.csv"))
    text = kernels.table(about, read)
    assert "| 2, 64, 64, 640 | bfloat16 | forward | mosaic | 1 | 1 | 4e+03 | 95% |" in text
    assert "| xla | 30 | 20 |  | 95% |" in text and "| flash_attention | 7 |" in text and text.count("| sdxl") == 4
    assert "hardware 1 x NVIDIA H200" in text
    lines = kernels.curves(read, channels=640, batch_size=2, dtype="bfloat16", pass_="forward")
    assert lines["mosaic"] == [(64.0, 8.0), (pytest.approx(724.08, abs=0.01), 36.0)]
    assert lines["xla"] == [(64.0, 120.0)] and lines["flash_attention"] == [(64.0, 7.0)]
    kernels.draw(lines, "title", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="csv: expected timed rows of this width, batch size, .*, got none"):
        kernels.curves(read, channels=8, batch_size=2, dtype="bfloat16", pass_="forward")


def test_whole_mixers_are_drawn_as_they_are(tmp_path):
    rows = [row(candidate="gspn", median_ms=2.0, gb_per_s=1.0), row(candidate="flash_attention", median_ms=3.0)]
    tables.write(tmp_path / "run.csv", rows, mixers.COLUMNS)
    about, read = kernels.read(str(tmp_path / "run.csv"))
    lines = kernels.curves(read, channels=640, batch_size=2, dtype="bfloat16", pass_="forward")
    assert lines == {"gspn": [(64.0, 2.0)], "flash_attention": [(64.0, 3.0)]}
    assert "| bfloat16 | forward | gspn | 2 | 1 | 1 | 95% |" in kernels.table(about, read)


def test_a_dry_run_is_not_drawn(tmp_path):
    tables.write(tmp_path / "dry.csv", [], COLUMNS, {"kind": "DRY: shrunken maps"})
    with pytest.raises(ValueError, match="expected a run on a GPU"):
        kernels.read(str(tmp_path / "dry.csv"))
