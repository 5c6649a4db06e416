"""One run per folder."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gspn_jax import folder_lock
from gspn_jax.folder_lock import FILE, FolderInUse, hold


def write_lock(folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps(folder_lock._me("training") | changes))


def finished_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_a_second_run_is_refused_until_the_first_one_ends(tmp_path: Path):
    folder = tmp_path / "made" / "run"
    with hold(folder, "training"):
        assert json.loads((folder / FILE).read_text())["process"] == os.getpid()
        with pytest.raises(FolderInUse, match=rf"^{folder} is in use for training by process {os.getpid()} on this"):
            with hold(folder, "sampling"):
                raise AssertionError("entered")
    assert not list(folder.iterdir())
    with pytest.raises(KeyError), hold(folder, "training"):
        raise KeyError("any error")
    assert not list(folder.iterdir())


def test_the_lock_of_a_dead_process_is_replaced(tmp_path: Path):
    for changes in ({"process": finished_process()}, {"started": 1}, {"process": finished_process(), "started": None}):
        write_lock(tmp_path, **changes)
        with hold(tmp_path, "training"):
            assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()
        assert not (tmp_path / FILE).exists()


def test_other_locks_are_respected_and_the_message_says_how_to_remove_them(tmp_path: Path):
    dead = {"process": finished_process()}
    for changes, words in (
        (
            {"host": "elsewhere", **dead},
            f"process {dead['process']} on host elsewhere since .*; if .*remove {tmp_path}",
        ),
        ({"namespace": "pid:[1]", **dead}, f"remove {tmp_path}/.lock"),
    ):
        write_lock(tmp_path, **changes)
        before = (tmp_path / FILE).read_bytes()
        with pytest.raises(FolderInUse, match=words) as error, hold(tmp_path, "training"):
            raise AssertionError("entered")
        assert "\n" not in str(error.value) and (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_text("{")
    with pytest.raises(FolderInUse, match=f"its lock file does not name; .* remove {tmp_path}"):
        hold(tmp_path, "training").__enter__()


def test_one_of_many_replaces_a_dead_lock(tmp_path: Path):

    def take(barrier: threading.Barrier, got: list[bool]) -> None:
        barrier.wait()
        try:
            with hold(tmp_path, "training"):
                got.append(True)
                barrier.wait()
        except FolderInUse:
            barrier.wait()

    for _ in range(10):
        write_lock(tmp_path, process=finished_process())
        got: list[bool] = []
        barrier = threading.Barrier(8, timeout=60)
        threads = [threading.Thread(target=take, args=(barrier, got)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [True] and not (tmp_path / FILE).exists()


def test_a_lock_that_changed_hands_is_not_removed(tmp_path: Path):
    with hold(tmp_path, "training"):
        write_lock(tmp_path, host="elsewhere")  # a person removed ours, and another run took the folder
    assert json.loads((tmp_path / FILE).read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("number", [0, 1])
def test_all_processes_of_a_run_fail_with_process_0(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_lock(tmp_path)
    answers = []

    def allgather(mine: np.ndarray) -> np.ndarray:
        answers.append(bool(mine))
        return np.array([False, True])

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: number)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", allgather)
    with pytest.raises(FolderInUse, match=("in use for training by", "process 0 could not lock")[number]):
        with hold(tmp_path, "training"):
            raise AssertionError("entered")
    assert answers == [number == 1] and (tmp_path / FILE).exists()


def test_folders_that_cannot_be_locked(tmp_path: Path):
    with pytest.raises(ValueError, match="folder: expected the name of a folder, got ''"):
        hold("", "training").__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot lock {tmp_path}/file/run: Not a directory"):
        hold(tmp_path / "file" / "run", "training").__enter__()
