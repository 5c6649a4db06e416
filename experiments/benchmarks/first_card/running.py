"""Runs steps, each in a process with a time limit, and says at the end what became of them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from experiments.benchmarks.first_card.plan import Step

ROOT = Path(__file__).resolve().parents[3]
RESULTS, LOG, SUMMARY = "results.jsonl", "log.txt", "summary.txt"
# A step that would have less is not begun: a process needs this much to start JAX.
LEAST_SECONDS = 15.0

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Adds a line of JSON that outlives a crash of this process or of the machine."""
    with path.open("a") as file:
        file.write(json.dumps(row, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """Returns the rows of a file of results, without a last line that was cut off; none if there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@dataclasses.dataclass
class Running:
    """A started step."""

    step: Step
    process: subprocess.Popen[bytes]
    start: float
    limit: float

    def wait(self) -> str:
        """Waits until the step ends or its time is over, and returns "done", "failed" or "timed out"."""
        try:
            code = self.process.wait(max(0.0, self.start + self.limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            return "timed out"
        return "done" if code == 0 else "failed"

    def end(self) -> None:
        """Kills the step and all processes that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # a driver that hangs holds the process
            print(f"{self.step.name}: does not end", flush=True)


class Runner:
    """Runs the steps of one part.

    Args:
        out: folder of results, log and summary.
        command: step -> the command of its process.
        environment: of these processes.
        seconds: time of the part.
        outcomes: gets a row for each step.
    """

    def __init__(
        self,
        out: Path,
        command: Callable[[Step], Sequence[str]],
        environment: dict[str, str],
        seconds: float,
        outcomes: list[Row],
    ):
        self.out, self.command, self.environment = out, command, environment
        self.end = time.monotonic() + seconds
        self.outcomes = outcomes
        self._running: list[Running] = []

    def run(self, part: int, steps: Sequence[Step]) -> None:
        """Runs all steps; every step leaves one row in the results, whatever happens."""
        left = list(steps)
        try:
            with (self.out / LOG).open("a") as log:
                while left and self.end - time.monotonic() > LEAST_SECONDS:
                    step = left.pop(0)
                    started = self._start(step, log)
                    if not step.beside:
                        self._note(part, started)
                for started in list(self._running):
                    self._note(part, started)
        finally:
            for started in self._running:
                started.end()
                self._report(part, started.step, "interrupted", time.monotonic() - started.start)
            for step in left:
                self._report(part, step, "not reached", 0.0)

    def _start(self, step: Step, log: TextIO) -> Running:
        print(f"== {step.name}", file=log, flush=True)
        process = subprocess.Popen(
            self.command(step), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
            env=self.environment, start_new_session=True,
        )  # fmt: skip
        now = time.monotonic()
        self._running.append(Running(step, process, now, min(step.seconds, self.end - now)))
        return self._running[-1]

    def _note(self, part: int, started: Running) -> None:
        outcome = started.wait()
        self._running.remove(started)
        self._report(part, started.step, outcome, time.monotonic() - started.start)

    def _report(self, part: int, step: Step, outcome: str, seconds: float) -> None:
        row = {"kind": "step", "part": part, "step": step.name, "status": outcome, "seconds": round(seconds, 1)}
        self.outcomes.append(row)
        append(self.out / RESULTS, row)
        print(f"{outcome}: {step.name}, {seconds:.0f} s", flush=True)


def python(*words: str) -> list[str]:
    """Returns the command that runs a module with this Python."""
    return [sys.executable, "-m", *words]


def step_command(work: str, out: Path, kept: Path, *, of: str = "", dry: bool = False, commit: str = "") -> list[str]:
    """Returns the command of a step's process."""
    words = [f"--work={work}", f"--of={of}", f"--out={out}", f"--kept={kept}", f"--commit={commit}"]
    return python("experiments.benchmarks.first_card.step", *words, *(["--dry"] if dry else []))


def environment(kept: Path, *, dry: bool) -> dict[str, str]:
    """Returns the environment of steps: the platform, and compiled programs that outlive a process."""
    ours = {
        "JAX_PLATFORMS": "cpu" if dry else os.environ.get("JAX_PLATFORMS", "cuda,cpu"),
        "JAX_COMPILATION_CACHE_DIR": str(kept / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Some steps run beside others.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONUNBUFFERED": "1",
    }
    # The interpreter takes a CPU device for each warpgroup.
    of_dry = {"JAX_NUM_CPU_DEVICES": "8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if dry else {}
    return {**os.environ, **ours, **of_dry}
