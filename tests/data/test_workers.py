"""Tests that worker processes give the same batches. They start slowly, so three tests check much."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gspn_jax import data
from tests.data import pictures

RECIPE = data.Augmentation(crop="resized", flip=True, randaugment_magnitude=9, erasing=0.25)


def batches(source, num_workers: int) -> data.Batches:
    return data.training_batches(
        source,
        batch_size=6,
        image_size=16,
        augmentation=RECIPE,
        num_workers=num_workers,
        num_threads=2,
        on_corrupt="drop",
    )


def test_workers_restore_and_give_the_same_batches_and_count_corrupt_images(tmp_path, caplog):
    pictures.write_folder(tmp_path)
    pictures.truncate(tmp_path / "train/class_1/02.jpg")
    source = data.load("image_folder", str(tmp_path)).train
    plain = batches(source, 0)
    for _ in range(3):
        next(plain)
    state = plain.state()
    expected = [next(plain) for _ in range(7)]
    assert sum(batch["replaced"] for batch in expected) >= 2
    caplog.clear()
    workers = batches(source, 2)
    workers.restore(state)
    for batch in expected[:5]:
        got = next(workers)
        assert set(got) == set(batch) and got["replaced"] == batch["replaced"]
        for name in ("image", "label"):
            assert type(got[name]) is np.ndarray  # not in shared memory
            np.testing.assert_array_equal(got[name], batch[name])
    assert len([record for record in caplog.records if "class_1/02.jpg" in record.getMessage()]) == 1
    plain.restore(workers.state())
    np.testing.assert_array_equal(next(plain)["image"], expected[5]["image"])
    workers.close()
    plain.close()


def test_a_corrupt_image_stops_a_worker_with_its_path(tmp_path):
    pictures.write_folder(tmp_path)
    pictures.truncate(tmp_path / "val/class_2/01.jpg")
    source = data.load("image_folder", str(tmp_path)).test
    run = data.evaluation_batches(source, batch_size=4, image_size=16, num_workers=1)
    assert next(run)["mask"].all()
    with pytest.raises(data.CorruptImage, match=r"val/class_2/01.jpg: cannot be decoded \(.*truncated"):
        list(run)
    run.close()


PROGRAM = """
from gspn_jax import data

if __name__ == "__main__":
    source = data.load("fake", image_size=16, train_size=32).train
    options = dict(batch_size=8, image_size=16, num_threads=4, num_workers=1)
    training = data.training_batches(source, **options)
    kept = [next(training) for _ in range(3)]  # neither let go nor closed
    kept += list(data.evaluation_batches(source, **options))
    print(len(kept))
"""


@pytest.mark.full
def test_no_shared_memory_is_left_behind(tmp_path: Path):
    """Checks that Python's resource tracker does not complain at the end of a program."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    root = str(Path(__file__).parents[2])
    run = subprocess.run(command, env={"PYTHONPATH": root, "PATH": ""}, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "7\n", "")
