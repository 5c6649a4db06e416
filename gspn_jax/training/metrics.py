"""Reports of a run: `metrics.jsonl`, TensorBoard events, console lines."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from tensorboardX import SummaryWriter

from gspn_jax.training.checkpoints.set_aside import set_aside

FILE = "metrics.jsonl"
EVENTS = "tensorboard"


class Metrics:
    """Writes rows of numbers.

    A damaged `metrics.jsonl` is renamed to `metrics.jsonl.damaged`; the new file keeps its good lines.

    Args:
        workdir: rows go to `metrics.jsonl`, events to `tensorboard/` in this folder.
        step: step at which the run resumes; rows of later steps, from a run that was cut off, are removed.
        active: whether this process writes; only one process of a run should.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, step: int = 0, active: bool = True):
        self._active = active
        self._evaluated: set[int] = set()
        if not active:
            return
        self._path = Path(workdir) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows, damage = _parse(self._path)
        kept = [row for row in rows if step and row["step"] <= step]
        self._evaluated = {row["step"] for row in kept if row["kind"] == "evaluation"}
        with self._writing():
            if damage:
                aside = set_aside(self._path, self._path.with_name(f"{FILE}.damaged"))
                logging.warning("%s is damaged (%s): moved to %s, good lines are kept", self._path, damage, aside.name)
            draft = self._path.with_suffix(".tmp")
            draft.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
            os.replace(draft, self._path)
            self._file = self._path.open("ab", buffering=0)  # without a buffer, closing it cannot fail
            self._events = SummaryWriter(str(Path(workdir) / EVENTS), purge_step=step + 1 if step else None)

    def evaluated(self, step: int) -> bool:
        """Returns whether an evaluation of this step was reported already."""
        return step in self._evaluated

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Adds one row; NaN and Inf become null.

        Args:
            kind: "train" or "evaluation".
            step: number of optimiser steps so far.
            values: name -> number.
        """
        if not self._active:
            return
        row: dict[str, Any] = {"kind": kind, "step": step}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._writing():
            self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())
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
            with contextlib.suppress(OSError):  # a full disk is reported by the checkpoints
                self._events.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write under {self._path.parent}: {error.strerror or error}") from error


def read_rows(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the rows of `metrics.jsonl`, without a last line that was cut off; [] if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(workdir) / FILE
    rows, damage = _parse(path)
    if damage:
        raise ValueError(f"{path}: {damage}")
    return rows


def _parse(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns the good rows of a file, and words that name the first bad line; "" if all lines are good."""
    if not path.exists():
        return [], ""
    rows: list[dict[str, Any]] = []
    damage = ""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int) or not isinstance(row["kind"], str):
                raise ValueError("expected a step and a kind")
            rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                damage = damage or f"line {number} is not a row of JSON: {type(error).__name__}: {error}"
    return rows, damage


class Means:
    """Means of numbers over the steps since the last report; counts are summed over the run.

    Checkpoints hold its state, so that a resumed run reports the same numbers as an uninterrupted one.
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
        """Returns JSON; a sum that is NaN or Inf, which JSON cannot hold, is a string."""
        sums = {name: total if math.isfinite(total) else str(total) for name, total in self._sums.items()}
        return {"sums": sums, "steps": self._steps, "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state that `state` returned."""
        self._sums, self._steps = {name: float(total) for name, total in state["sums"].items()}, int(state["steps"])
        self._counts = dict(state["counts"])


class Clock:
    """Speed over the steps since the last report.

    The first step, which compiles, is not counted, nor is time that `pause` reports (evaluation, the start of a save).
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
        """Subtracts time that was not spent on steps."""
        self._paused += seconds

    def take(self) -> float:
        """Returns images per second since the last call; 0 if no step was counted."""
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
