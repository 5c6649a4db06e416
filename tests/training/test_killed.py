"""Runs that a signal ends and that are continued."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from gspn_jax import folder_lock
from gspn_jax.folder_lock import FolderInUse
from gspn_jax.training.metrics import read_rows
from tests.training.toy import Outcome, Started, toy_train

STEPS = 24


def without_speed(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, list[dict]]:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = Started({"workdir": str(folder / "run"), "num_steps": STEPS}, folder).wait()
    return outcome, without_speed(read_rows(folder / "run"))


def at_step(first: int, end: int) -> dict:
    """Death before a random step from `first` to `end` - 1."""
    return {"batches": {"kill_at": random.Random(first).randrange(first, end)}}


def in_save(step: int, least: float, most: float) -> dict:
    """Death a random time, in seconds, after a save began."""
    return {"kill_save": (step, random.Random(step).uniform(least, most))}


@pytest.mark.parametrize(
    "deaths",
    [
        [at_step(1, 5), in_save(10, 0.0, 0.03), at_step(11, 20)],  # the first one before there is a checkpoint
        pytest.param(
            [in_save(5, 0.0, 0.03), at_step(6, 10), in_save(10, 0.03, 0.1), in_save(15, 0.0, 0.0), at_step(16, 20)],
            marks=pytest.mark.full,
        ),
    ],
)
def test_kill_at_random_moments_and_resume(whole: tuple[Outcome, list[dict]], tmp_path: Path, deaths: list[dict]):
    """SIGKILL while stepping and while saving, each run continues the one before: bit-equal in the end."""
    workdir = str(tmp_path / "run")
    for death in deaths:
        outcome = Started({"workdir": workdir, "num_steps": STEPS, **death}, tmp_path).wait()
        assert outcome.code == -signal.SIGKILL, outcome.err
        assert (tmp_path / "run" / folder_lock.FILE).exists()  # of the dead process: the next run replaces it
    last = Started({"workdir": workdir, "num_steps": STEPS}, tmp_path).wait()
    assert "resuming at step" in last.out
    assert last.result == whole[0].result
    assert without_speed(read_rows(workdir)) == whole[1]
    assert not (tmp_path / "run" / folder_lock.FILE).exists()


@pytest.mark.full
def test_a_generator_that_is_killed(tmp_path: Path):
    """SIGKILL while stepping and while saving: bit-equal in the end, times and noise and dropped labels included."""
    arguments = {"num_steps": 12, "generates": True}
    whole = Started({"workdir": str(tmp_path / "whole"), **arguments}, tmp_path).wait()
    workdir = str(tmp_path / "run")
    for death in ({"kill_save": (5, 0.01)}, {"batches": {"kill_at": 9, "pause": 0.3}}):  # time to save step 5
        outcome = Started({"workdir": workdir, **arguments, **death}, tmp_path).wait()
        assert outcome.code == -signal.SIGKILL, outcome.err
    last = Started({"workdir": workdir, **arguments}, tmp_path).wait()
    assert "resuming at step" in last.out and last.result == whole.result and "ema_loss" in last.result
    assert without_speed(read_rows(workdir)) == without_speed(read_rows(tmp_path / "whole"))


@pytest.mark.full
def test_kill_from_outside_at_random_times(whole: tuple[Outcome, list[dict]], tmp_path: Path):
    rng = random.Random(1)
    workdir = tmp_path / "run"
    arguments = {"workdir": str(workdir), "num_steps": STEPS, "checkpoint_steps": 2, "batches": {"pause": 0.05}}
    started = Started(arguments, tmp_path)
    deadline = time.monotonic() + 60
    while not (workdir / "checkpoints" / "4").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    started.process.kill()
    assert started.wait().code == -signal.SIGKILL
    last = Started({"workdir": str(workdir), "num_steps": STEPS}, tmp_path).wait()
    assert last.result["digest"] == whole[0].result["digest"]


def test_sigterm_saves_and_exits_143_and_the_run_goes_on_while_a_second_run_is_refused(
    whole: tuple[Outcome, list[dict]], tmp_path: Path
):
    workdir = tmp_path / "run"
    arguments = {"workdir": str(workdir), "num_steps": STEPS, "checkpoint_steps": 0, "batches": {"pause": 0.1}}
    started = Started(arguments, tmp_path)
    deadline = time.monotonic() + 60
    while "step 3/" not in started.printed() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(FolderInUse, match=f"in use for training by process {started.process.pid} on this host"):
        toy_train(str(workdir), num_steps=STEPS)
    started.process.terminate()
    outcome = started.wait()
    assert outcome.code == 143, outcome.err
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert len(saved) == 1 and 3 <= saved[0] < STEPS
    assert f"stopped after step {saved[0]}" in outcome.err and "last good checkpoint" in outcome.err
    last = Started({"workdir": str(workdir), "num_steps": STEPS}, tmp_path).wait()
    assert f"resuming at step {saved[0]}" in last.out
    assert last.result == whole[0].result
    assert without_speed(read_rows(workdir)) == whole[1]
    shutil.rmtree(workdir)
