"""Several processes."""

import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from gspn_jax.folder_lock import hold
from gspn_jax.training.distributed import _launched_with_others, initialise
from gspn_jax.training.metrics import read_rows
from tests.training.toy import Started

STEPS = 10


def start_pair(folder: Path, **more) -> list[Started]:
    """Two processes with two CPU devices each, one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = {"workdir": str(folder / "run"), "num_steps": STEPS, "devices": 2, "mesh": {"data": 4}, **more}
    return [Started({**arguments, "distributed": (address, 2, number)}, folder / str(number)) for number in range(2)]


def test_two_processes_give_the_loss_curve_of_one_also_when_stopped_between(tmp_path: Path):
    """SIGTERM to one of two: both save the same step and exit 143; the pair goes on; one process did it alone."""
    one = Started({"workdir": str(tmp_path / "one"), "num_steps": STEPS}, tmp_path)
    pair = start_pair(tmp_path, batches={"pause": 0.2}, checkpoint_steps=0)
    deadline = time.monotonic() + 120
    while "step 2/" not in pair[0].printed() and time.monotonic() < deadline:
        time.sleep(0.05)
    pair[1].process.terminate()
    stopped = [process.wait() for process in pair]
    assert [outcome.code for outcome in stopped] == [143, 143], stopped[0].err
    (saved,) = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert 2 <= saved < STEPS

    first, second = [process.wait() for process in start_pair(tmp_path)]
    assert first.result == second.result and first.result["step"] == STEPS == one.wait().result["step"]
    assert "processes: 2" in first.out and f"resuming at step {saved}" in first.out
    assert "step" not in second.out.splitlines()[0] or second.out.count("\n") == 1  # only process 0 reports
    curves = [[row["loss"] for row in read_rows(tmp_path / name) if row["kind"] == "train"] for name in ("one", "run")]
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-5)
    assert len(curves[0]) == STEPS and np.ptp(curves[0]) > 0.05
    top1, images = [read_rows(tmp_path / name)[-1]["top1"] for name in ("one", "run")], first.result["images"]
    assert top1[0] == top1[1] and images == 40


@pytest.mark.full
def test_two_processes_train_the_generator_of_one(tmp_path: Path):
    one = Started({"workdir": str(tmp_path / "one"), "num_steps": 6, "generates": True}, tmp_path)
    first, second = [process.wait() for process in start_pair(tmp_path, num_steps=6, generates=True, loads=True)]
    assert first.result == second.result and "processes: 2" in first.out
    assert first.result["loaded"] == first.result["params"]  # as evaluation and sampling load them
    assert first.result["loss"] == pytest.approx(one.wait().result["loss"], rel=1e-4)
    curves = [[row["loss"] for row in read_rows(tmp_path / name) if row["kind"] == "train"] for name in ("one", "run")]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    assert len(curves[0]) == 6


@pytest.mark.full
def test_both_processes_fail_if_another_run_holds_the_workdir(tmp_path: Path):
    with hold(tmp_path / "run", "training"):
        first, second = [process.wait() for process in start_pair(tmp_path)]
    assert first.code == second.code == 1
    assert f"in use for training by process {os.getpid()}" in first.err and "process 0 could not lock" in second.err


def test_launchers_are_recognised():
    assert not _launched_with_others({})
    assert not _launched_with_others({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert not _launched_with_others({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})  # the shell of an allocation
    assert _launched_with_others({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"})
    assert _launched_with_others({"OMPI_COMM_WORLD_SIZE": "2"})
    assert _launched_with_others({"TPU_WORKER_HOSTNAMES": "a,b"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("host:1", None, None), "expected all three or none"), (("host:1", 2, 2), r"process_id: .* in \[0, 2\), got 2")],
)
def test_addresses_that_do_not_make_sense(arguments: tuple, words: str):
    with pytest.raises(ValueError, match=words):
        initialise(*arguments)
