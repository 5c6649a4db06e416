"""The files of what was measured on cards."""

import dataclasses
import json

import pytest

from pallas_kernels.mosaic import measured

CARD = "NVIDIA H200"


@dataclasses.dataclass(frozen=True)
class Map:
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    weight_channels: int = 64
    chunk: int | None = None
    rank: int = 8


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    return tmp_path


def test_a_card_without_a_file_has_nothing():
    assert measured.tile(CARD, "a") is None and measured.rates(CARD) == {}
    assert measured.nearest(CARD, Map((1, 8, 8, 64))) is None


def test_what_is_added_is_found_by_this_card_alone(folder):
    path = measured.add(CARD, about={"commit": "c"}, rates={"clock": 1.8e9}, folder=folder)
    measured.add(CARD, tiles={"a": {"channels": 16, "milliseconds": 0.5}}, folder=folder)
    measured.add(CARD, tiles={"b": {"channels": 8, "milliseconds": 0.1}}, folder=folder)
    assert path.name == "nvidia_h200.json" and json.loads(path.read_text())["about"] == {"card": CARD, "commit": "c"}
    assert measured.tile(CARD, "a") == {"channels": 16, "milliseconds": 0.5} and measured.rates(CARD)["clock"] == 1.8e9
    assert measured.tile("NVIDIA H100 80GB HBM3", "a") is None
    measured.add(CARD, rates={"launch": 3e-6}, folder=folder)
    assert measured.rates(CARD) == {"launch": 3e-6}
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_times_of_a_propagation_join_its_row_and_the_nearest_is_found(folder):
    small, large = Map((2, 16, 16, 64)), Map((2, 64, 64, 64), chunk=4)
    for one, variant, ms in ((small, "scans", 1.0), (large, "low_rank", 2.0), (small, "low_rank", 3.0)):
        times = {"inference": {variant: ms}}
        measured.add(CARD, propagation=dataclasses.asdict(one), milliseconds=times, folder=folder)
    measured.add(CARD, propagation=dataclasses.asdict(small), milliseconds={"backward": {"scans": 4.0}}, folder=folder)
    row = measured.nearest(CARD, Map((2, 16, 20, 64)))
    assert row is not None and row["shape"] == [2, 16, 16, 64]
    assert row["milliseconds"] == {"inference": {"scans": 1.0, "low_rank": 3.0}, "backward": {"scans": 4.0}}
    row = measured.nearest(CARD, Map((2, 64, 48, 64), chunk=4))
    assert row is not None and row["chunk"] == 4 and row["milliseconds"] == {"inference": {"low_rank": 2.0}}


def test_a_crash_leaves_the_old_file(folder, monkeypatch):
    path = measured.add(CARD, rates={"clock": 1.0}, folder=folder)

    def crash(*_):
        raise OSError("no space left")

    monkeypatch.setattr(measured.os, "replace", crash)
    with pytest.raises(OSError):
        measured.add(CARD, rates={"clock": 2.0}, folder=folder)
    assert json.loads(path.read_text())["rates"] == measured.rates(CARD) == {"clock": 1.0}
