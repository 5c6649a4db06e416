"""Checks and times programs one at a time, and writes a row for each."""

import abc
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from experiments import tables
from experiments.benchmarks import device_time
from experiments.benchmarks.gate import Verdict

# A round through all sets of inputs and results exceeds 60 MB of cache several times.
ROTATED_BYTES = 2**28
COPIED_BYTES = 2**31
FIGURES: tuple[str, ...] = (
    "candidate", "pass", "status", "median_ms", "spread_ms", "runs", "clock", "host_ms", "bytes", "gb_per_s", "share",
    "compiled_mib", "process_peak_mib", "error", "checked", "input_sets", "note",
)  # fmt: skip


class DeviceLost(RuntimeError):
    """The GPU no longer serves this process after a faulty access."""


class Case(abc.ABC):
    """A program to check and time. Subclasses are frozen dataclasses, so that cases are hashable."""

    @abc.abstractmethod
    def columns(self) -> dict[str, Any]:
        """Returns the columns that name the case, "candidate" and "pass" among them."""

    @abc.abstractmethod
    def reason_against(self) -> str | None:
        """Returns why the case cannot run on this machine, or None."""

    @abc.abstractmethod
    def judged_by(self) -> "Case | None":
        """Returns the case whose verdict holds for this one; None if nothing is compared."""

    @abc.abstractmethod
    def is_reference(self) -> bool:
        """Says whether others are compared with this one."""

    @abc.abstractmethod
    def draw(self, key: jax.Array) -> tuple[Any, ...]:
        """Returns random arguments of the program."""

    @abc.abstractmethod
    def program(self) -> Callable[..., Any]:
        """Returns the function that is compiled, checked and timed."""

    @abc.abstractmethod
    def compare(self, program: Callable[..., Any], given: tuple[Any, ...]) -> Verdict:
        """Runs the compiled program on `given` and compares its results with the reference's."""

    @abc.abstractmethod
    def bytes_moved(self) -> int:
        """Returns the least bytes that the program must read and write in device memory."""

    def remark(self) -> str | None:
        """Returns a note for the row of a timed case."""
        return None


class Measurement:
    """Checks and times cases within a budget of seconds, and writes a row for each."""

    def __init__(
        self,
        file: TextIO,
        columns: Sequence[str],
        about: dict[str, str] | None = None,
        *,
        clock: str,
        dry: bool,
        runs: int,
        seed: int,
        budget_s: float = math.inf,
    ):
        """Begins a CSV.

        Args:
            file: where the rows go.
            columns: names of the columns; `FIGURES` are among them.
            about: header of the CSV.
            clock: as `device_time.choose_clock` returns it.
            dry: makes a few runs and writes no device times.
            runs: timed runs of a case, at most.
            seed: seed of all inputs.
            budget_s: seconds after which no case is begun.
        """
        self.columns, self.writer = columns, tables.Writer(file, columns, about)
        self.clock, self.dry, self.runs = clock, dry, runs
        self.start, self.budget_s = time.monotonic(), budget_s
        self.rows: list[dict[str, Any]] = []
        self.copy_gb_per_s: float | None = None
        self._key = jax.random.key(seed)
        self._verdicts: dict[Case, Verdict] = {}
        self._programs: dict[Case, Any] = {}

    def seconds_left(self, part: float = 1.0) -> float:
        """Returns how much is left of this part of the budget."""
        return part * self.budget_s - (time.monotonic() - self.start)

    def write(self, case: Case | None, status: str, **values: Any) -> None:
        """Writes and prints a row; `values` adds to the columns of the case."""
        row: dict[str, Any] = {**dict.fromkeys(self.columns), **(case.columns() if case else {}), "status": status}
        row.update(values)
        self.rows.append(row)
        self.writer.write({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        shown = {key: row[key] for key in ("median_ms", "spread_ms", "gb_per_s", "share", "error", "note")}
        figures = [f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in shown.items() if value]
        print(f"{status}:", case or f"{row['candidate']} {row['pass']}", *figures, flush=True)

    def check(self, case: Case) -> None:
        """Checks the case once, writes a row about it and keeps the verdict."""
        judge = case.judged_by()
        if judge is None or judge in self._verdicts or judge.reason_against() is not None:
            return
        if judge.is_reference():
            self._verdicts[judge] = Verdict(True, None, "is the reference")
            return
        gate: dict[str, Any] = {"pass": "gate"}
        try:
            given = judge.draw(self._next_key())
            verdict = judge.compare(self._compiled(judge, given), given)
        except Exception as error:
            self._verdicts[judge] = Verdict(False, None, "", _describe(error))
            self.write(judge, _failure(error), **gate, note=_describe(error))
            self._stop_if_lost(error)
            return
        self._verdicts[judge] = verdict
        found = {"error": verdict.error, "checked": verdict.checked, "note": verdict.reason or None}
        self.write(judge, "right" if verdict.passed else "WRONG", **gate, **found)

    def time(self, case: Case) -> None:
        """Writes the time of a case that runs and is right, or why there is none."""
        reason = case.reason_against()
        if reason is not None:
            self.write(case, "not run", note=reason)
            return
        self.check(case)
        judge = case.judged_by()
        verdict = self._verdicts[judge] if judge in self._verdicts else Verdict(True, None, "not compared")
        if not verdict.passed:
            self.write(case, "refused", error=verdict.error, checked=verdict.checked, note=verdict.reason)
            return
        try:
            values = self._timed(case)
        except Exception as error:
            self.write(case, _failure(error), note=_describe(error))
            self._stop_if_lost(error)
            return
        self.write(case, self._status(values), **values, error=verdict.error, checked=verdict.checked)

    def run(
        self,
        cases: Sequence[Case],
        *,
        check_part: float = 0.0,
        after_checks: Callable[[], object] = lambda: None,
        timed: bool = True,
    ) -> None:
        """Checks and times cases within the budget. A case that is not reached gets a row that says so.

        Args:
            cases: in the order in which time is best spent.
            check_part: share of the budget for checks before anything is timed; other cases are checked in turn.
            after_checks: is called between these checks and the first time.
            timed: False stops there.
        """
        reached = -1
        try:
            for case in cases if check_part else ():
                if self.seconds_left(check_part) <= 0:
                    break
                self.check(case)
            after_checks()
            if not timed:
                return
            self.measure_copy()
            for reached, case in enumerate(cases):
                if self.seconds_left() <= 0:
                    return self.leave_out(cases[reached:], "the budget was used up")
                self.time(case)
        except DeviceLost as error:
            self.leave_out(cases[reached + 1 :], str(error))

    def leave_out(self, cases: Sequence[Case], reason: str) -> None:
        for case in cases:
            self.write(case, "left out", note=reason)

    def measure_copy(self) -> None:
        """Measures the rate at which this device reads and writes: the faster of a copy and a product with two."""
        x = jax.random.normal(self._next_key(), ((2**12 if self.dry else COPIED_BYTES) // 4,))
        for name, function in (("copy", jnp.copy), ("copy_doubled", lambda x: 2 * x)):
            try:
                compiled = jax.jit(function).lower(x).compile()
                timing = self._measure(lambda _, run=compiled: run(x))
            except Exception as error:
                self.write(None, "failed", candidate=name, note=_describe(error))
                continue
            values = {**self._figures(timing, 2 * x.nbytes), "pass": "forward", "share": None}
            self.write(None, self._status(values), candidate=name, **values)
            if values["gb_per_s"]:
                self.copy_gb_per_s = max(self.copy_gb_per_s or 0.0, values["gb_per_s"])

    def _timed(self, case: Case) -> dict[str, Any]:
        moved = case.bytes_moved()
        count = 2 if self.dry else 1 if moved >= 2**30 else min(64, 2 + ROTATED_BYTES // moved)
        sets = [case.draw(self._next_key()) for _ in range(count)]
        compiled = self._compiled(case, sets[0])
        timing = self._measure(lambda index: compiled(*sets[index % count]))
        memory, kept = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
        values = {**self._figures(timing, moved), "input_sets": count, "note": case.remark()}
        if memory is not None:
            needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            values["compiled_mib"] = round(needed / 2**20, 1)
        if "peak_bytes_in_use" in kept:  # since the process began: nothing resets the allocator's peak
            values["process_peak_mib"] = round(kept["peak_bytes_in_use"] / 2**20)
        return values

    def _status(self, values: dict[str, Any]) -> str:
        return "dry" if self.dry else "timed" if values["median_ms"] else "no device time"

    def _measure(self, run: Callable[[int], Any]) -> device_time.Timing:
        return device_time.measure(run, clock=self.clock, most_runs=self.runs, seconds=0.02 if self.dry else 0.3)

    def _figures(self, timing: device_time.Timing, moved: int) -> dict[str, Any]:
        rate = None if timing.median_ms is None else moved / timing.median_ms / 1e6
        share = rate / self.copy_gb_per_s if rate and self.copy_gb_per_s else None
        return {
            "median_ms": timing.median_ms, "spread_ms": timing.spread_ms, "runs": timing.runs, "clock": timing.clock,
            "host_ms": timing.host_ms, "bytes": moved, "gb_per_s": rate, "share": share,
        }  # fmt: skip

    def _next_key(self) -> jax.Array:
        """Returns a new key, so that each check and each set of inputs is drawn afresh."""
        self._key, key = jax.random.split(self._key)
        return key

    def _compiled(self, case: Case, given: tuple[Any, ...]) -> Any:
        if case not in self._programs:
            self._programs[case] = jax.jit(case.program()).lower(*given).compile()
        return self._programs[case]

    def _stop_if_lost(self, error: Exception) -> None:
        try:
            jax.block_until_ready(jnp.ones(8) + 1)
        except Exception:
            raise DeviceLost(f"the device is lost: {_describe(error)}") from error


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns (inputs, then a gradient of the result) -> (result, gradients of the inputs)."""

    def both(*inputs_and_gradient):
        result, pull = jax.vjp(function, *inputs_and_gradient[:-1])
        return result, pull(inputs_and_gradient[-1])

    return both


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Returns normally distributed numbers of two axes or more."""
    # In pieces: the random bits of the largest arrays would take more memory than the arrays.
    lines = shape[0] * shape[1]
    pieces = max(n for n in range(1, min(lines, 64) + 1) if lines % n == 0)
    draw = functools.partial(jax.random.normal, shape=(lines // pieces, *shape[2:]), dtype=jnp.dtype(dtype))
    return jax.lax.map(lambda k: draw(k), jax.random.split(key, pieces)).reshape(shape)


def _failure(error: Exception) -> str:
    """Tells a card that is too small from a program that fails."""
    return "out of memory" if "RESOURCE_EXHAUSTED" in str(error) else "failed"


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
