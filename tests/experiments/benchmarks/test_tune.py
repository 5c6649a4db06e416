"""The program that fills the table of measured tiles, in its dry form: two tiles, interpreted on a shrunken map."""

import json

import pytest

from experiments import tune_tiles
from pallas_kernels.mosaic import tiles


def test_what_is_found_enters_the_table_that_plans_read(tmp_path, monkeypatch):
    table = tmp_path / "tiles.json"
    monkeypatch.setattr(tune_tiles, "LEAST_GAIN", -10.0)  # keep the fastest whatever it gains
    arguments = ["--dry", f"--out={table}", "--shapes=gspn_nano_stage3", "--directions=down", "--passes=forward"]
    assert tune_tiles.main([*arguments, "--dtype=float32"]) == 0
    ((key, fields),) = json.loads(table.read_text())["dry"].items()
    work = tiles.Work.of_key(key)
    assert (work.kernel, work.batch, work.lines, work.length, work.channels) == ("forward", 2, 7, 7, 16)
    assert tiles.Tile(**fields).extent >= 7 and work.key == key


def test_a_dry_run_never_writes_the_real_table():
    with pytest.raises(SystemExit):
        tune_tiles.main(["--dry", "--shapes=gspn_nano_stage3"])


def test_without_a_card_nothing_is_timed(capsys):
    assert tune_tiles.main(["--shapes=gspn_nano_stage3"]) == 1
    assert "NVIDIA GPU" in capsys.readouterr().err
