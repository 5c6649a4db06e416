import csv
import json

import pytest

from experiments.figures import training


def test_numbers_and_picture_of_two_runs(tmp_path):
    runs = {}
    for name, shift in (("a", 0), ("b", 10)):
        (tmp_path / name).mkdir()
        rows = [
            {"kind": "train", "step": 1, "loss": 2.0 + shift, "accuracy": 5.0},
            {"kind": "evaluation", "step": 1, "top1": 20.0 + shift, "ema_top1": 21.0 + shift},
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs[name] = training.read(str(tmp_path / name))
    training.write_csv(runs, str(tmp_path / "both.csv"))
    training.draw(runs, str(tmp_path / "both.png"))
    with open(tmp_path / "both.csv") as file:
        table = list(csv.DictReader(file))
    assert [(row["run"], row["kind"], row["loss"], row["ema_top1"]) for row in table] == [
        ("a", "train", "2.0", ""), ("a", "evaluation", "", "21.0"), ("b", "train", "12.0", ""),
        ("b", "evaluation", "", "31.0"),
    ]  # fmt: skip
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"workdirs: expected folders of runs with a metrics.jsonl, got {tmp_path}"):
        training.read(str(tmp_path))
