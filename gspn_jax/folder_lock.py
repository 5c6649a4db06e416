"""One run per folder: a lock file that names its holder."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

FILE = ".lock"


class FolderInUse(ValueError):
    """Another run holds the folder; the message names it in one line."""


@contextlib.contextmanager
def hold(folder: str | os.PathLike[str], purpose: str) -> Iterator[None]:
    """Keeps other runs out of a folder while in the `with` block.

    Process 0 writes `<folder>/.lock` with its host, process id and start time, and removes it at the end. A lock whose
    process is dead is replaced if it was taken on this host. Every process of a run must enter the block: all of them
    fail if process 0 fails.

    Args:
        folder: made if it does not exist.
        purpose: what the holder does, for the message that others get, such as "training".

    Raises:
        FolderInUse: another run holds the folder.
        ValueError: the folder's name is empty.
        OSError: the folder cannot be made or written.
    """
    if not os.fspath(folder):
        raise ValueError("folder: expected the name of a folder, got ''")
    path, mine = Path(folder) / FILE, _me(purpose)
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            _take(path, mine)
        except Exception as reason:  # raised below: the other processes must hear of it first
            error = reason
    if jax.process_count() > 1 and not np.all(multihost_utils.process_allgather(np.array(error is None))):
        error = error or FolderInUse(f"{folder}: process 0 could not lock the folder; its message says why")
    if error is not None:
        raise error
    try:
        yield
    finally:
        # A forked child does not release its parent's lock, nor does a run whose lock a person has removed.
        if jax.process_index() == 0 and mine["process"] == os.getpid() and _read(path) == mine:
            path.unlink(missing_ok=True)


def _me(purpose: str) -> dict[str, Any]:
    return {
        "purpose": purpose,
        "host": socket.gethostname(),
        "namespace": _namespace(),
        "process": os.getpid(),
        "started": _start_time(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _take(path: Path, mine: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not _create(path, mine):
            _remove_if_dead(path)
    except OSError as error:
        raise OSError(f"cannot lock {path.parent}: {error.strerror or error}") from error


def _create(path: Path, mine: dict[str, Any]) -> bool:
    """Writes the lock; returns False if there is one."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(number, "w") as file:
            json.dump(mine, file)
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def _remove_if_dead(path: Path) -> None:
    """Removes the lock of a dead process; raises FolderInUse for any other."""
    try:
        file = path.open()
    except FileNotFoundError:  # released since
        return
    with file:
        with contextlib.suppress(OSError):  # file systems without flock
            # Two runs that find the same dead holder: the second one waits, then sees that the file is another one.
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                return
            holder = _read(path)
            if not _dead(holder):
                raise FolderInUse(_message(path, holder))
            path.unlink()


def _read(path: Path) -> dict[str, Any]:
    """Returns what a lock says; {} if it is missing, damaged or being written."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _dead(holder: dict[str, Any]) -> bool:
    number = holder.get("process")
    if not isinstance(number, int) or not _is_here(holder):
        return False
    if holder.get("started") is not None:
        return _start_time(number) != holder["started"]
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's process
        pass
    return False


def _is_here(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname() and holder.get("namespace") == _namespace()


def _message(path: Path, holder: dict[str, Any]) -> str:
    if _is_here(holder):
        words = f"by process {holder.get('process')} on this host since {holder.get('since')}"
    elif holder:
        words = f"by process {holder.get('process')} on host {holder.get('host')} since {holder.get('since')}"
    else:
        words = "by a process that its lock file does not name"
    advice = "" if _is_here(holder) else f"; if that process has ended, remove {path}"
    return f"{path.parent} is in use for {holder.get('purpose', 'another run')} {words}{advice}"


def _start_time(process: int) -> int | None:
    """Returns when a process started, in clock ticks since boot; None if it has ended or the system does not tell."""
    try:
        # The name of the program, in parentheses, may hold spaces and parentheses.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _namespace() -> str:
    """Returns the name of the space in which process ids count: containers have their own, maybe on one host name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
