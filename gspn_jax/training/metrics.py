"""What a run reports: `metrics.jsonl`, TensorBoard events, console lines."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"
EVENTS = "tensorboard"


class Metrics:
    """Writes rows of numbers. On every process but the first it only keeps quiet.

    Args:
        workdir: rows go to `metrics.jsonl`, events to `tensorboard/` in it.
        step: where the run resumes; rows of later steps, left by a run that was cut off, are removed.
        active: whether this process writes.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, step: int = 0, active: bool = True):
        self._active = active
        self._evaluated: set[int] = set()
        if not active:
            return
        self._path = Path(workdir) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(workdir) if step and row["step"] <= step]
        self._evaluated = {row["step"] for row in kept if row["kind"] == "evaluation"}
        with self._writing():
            draft = self._path.with_suffix(".tmp")
            draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(draft, self._path)
            self._file = self._path.open("ab", buffering=0)  # nothing is left to fail when it is closed
            self._events = SummaryWriter(str(Path(workdir) / EVENTS), purge_step=step + 1 if step else None)

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation of this step was reported already."""
        return step in self._evaluated

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Adds one row; numbers that are not finite become null.

        Args:
            kind: "train" or "evaluation".
            step: optimiser steps taken.
            values: name -> number.
        """
        if not self._active:
            return
        row: dict[str, Any] = {"kind": kind, "step": step}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._writing():
            self._file.write((json.dumps(row) + "\n").encode())
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
            if kind == "evaluation":
                self._evaluated.add(step)
                self._events.flush()

    def say(self, line: str) -> None:
        """Prints a line."""
        if self._active:
            print(line, flush=True)

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._file.close()
            with contextlib.suppress(OSError):  # a full disk was or will be reported by what must be on it
                self._events.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write under {self._path.parent}: {error.strerror or error}") from error


def read_rows(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the rows of `metrics.jsonl`, without a last line that was cut off; [] where there is no file."""
    path = Path(workdir) / FILE
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}: not JSON ({error})") from error
    return rows


class Means:
    """Means of numbers over the steps since the last report; counts are summed over the run.

    Its state goes into checkpoints, so that a resumed run reports what the uninterrupted one would.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Adds the numbers of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + int(value)
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Returns means and counts, and starts the means anew."""
        means: dict[str, float] = {name: total / self._steps for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        return means | dict(self._counts)

    def state(self) -> dict[str, Any]:
        """Returns JSON."""
        return {"sums": dict(self._sums), "steps": self._steps, "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned."""
        self._sums, self._steps = dict(state["sums"]), int(state["steps"])
        self._counts = dict(state["counts"])


class Clock:
    """Speed over the steps since the last report, and the time that is left.

    The first step compiles and is left out, and so is what happens in a `pause` (evaluation, the start of a save).
    """

    def __init__(self, images_per_step: int):
        self._images = images_per_step
        self._started: float | None = None
        self._steps = 0
        self._paused = 0.0

    def tick(self) -> None:
        """Call after every step."""
        if self._started is None:
            self._started = time.perf_counter()
        else:
            self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leaves out time that was not spent on steps."""
        self._paused += seconds

    def take(self) -> float:
        """Returns images per second since the last call, 0 where there is nothing to go by."""
        if self._started is None or not self._steps:
            return 0.0
        now = time.perf_counter()
        speed = self._steps * self._images / max(now - self._started - self._paused, 1e-9)
        self._started, self._steps, self._paused = now, 0, 0.0
        return speed


def duration(seconds: float) -> str:
    """Returns h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
