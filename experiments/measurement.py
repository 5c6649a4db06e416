"""Checks and times programs one at a time, and writes a row for each: what the benchmarks share.

Imports jax alone, beside the benchmarks' own files.
"""

import abc
import csv
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from experiments import device_time
from experiments.kernel_gate import Verdict

# The inputs and results of a round through all input sets exceed 60 MB of cache several times.
ROTATED_BYTES = 2**28
COPIED_BYTES = 2**31


class DeviceLost(RuntimeError):
    """After a faulty access the GPU serves this process no more; whatever else would only fail."""


class Measurement(abc.ABC):
    """Checks and times cases, and writes a row for each. What a case is, a subclass says; it is hashable."""

    columns: Sequence[str]

    def __init__(self, file: TextIO, *, clock: str, dry: bool, runs: int, seed: int, budget_s: float = math.inf):
        self.file, self.writer = file, csv.DictWriter(file, self.columns, restval="")
        self.clock, self.dry, self.runs = clock, dry, runs
        self.start, self.budget_s = time.monotonic(), budget_s
        self.rows: list[dict[str, Any]] = []
        self.copy_gb_per_s: float | None = None
        self._key = jax.random.key(seed)
        self._verdicts: dict[Any, Verdict] = {}
        self._programs: dict[Any, Any] = {}
        self.writer.writeheader()

    @abc.abstractmethod
    def describe(self, case: Any) -> dict[str, Any]:
        """The columns that name the case."""

    @abc.abstractmethod
    def reason_against(self, case: Any) -> str | None:
        """Why the case cannot run here; None if it can."""

    @abc.abstractmethod
    def judged_by(self, case: Any) -> Any | None:
        """The case whose verdict holds for this one; None where nothing is compared."""

    @abc.abstractmethod
    def is_reference(self, case: Any) -> bool:
        """Whether others are held against this one."""

    @abc.abstractmethod
    def compare(self, case: Any, program: Callable[..., Any], given: tuple[Any, ...]) -> Verdict:
        """Runs the compiled program and holds its results against the reference's."""

    @abc.abstractmethod
    def program(self, case: Any) -> Callable[..., Any]:
        """The function of `draw` that is compiled, checked and timed."""

    @abc.abstractmethod
    def draw(self, case: Any, key: jax.Array) -> tuple[Any, ...]:
        """Random arguments of the program."""

    @abc.abstractmethod
    def moved(self, case: Any) -> int:
        """The least bytes that the program must read and write in device memory."""

    def remark(self, case: Any) -> str | None:
        """What a timed row should say besides."""
        del case
        return None

    def late(self, part: float = 1.0) -> bool:
        """Whether this part of the budget is used up."""
        return time.monotonic() - self.start > part * self.budget_s

    def write(self, case: Any | None, status: str, **values: Any) -> None:
        row: dict[str, Any] = {**dict.fromkeys(self.columns), "status": status}
        row.update({} if case is None else self.describe(case))
        row.update(values)
        self.rows.append(row)
        self.writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        self.file.flush()
        shown = {key: row[key] for key in ("median_ms", "spread_ms", "gb_per_s", "share", "error", "note")}
        figures = [f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in shown.items() if value]
        print(f"{status}:", case or row["implementation"], row["pass"] if case is None else "", *figures, flush=True)

    def check(self, case: Any) -> None:
        """Writes the gate's row for the case, and keeps the verdict. Does it once."""
        case = self.judged_by(case)
        if case is None or case in self._verdicts or self.reason_against(case) is not None:
            return
        if self.is_reference(case):
            self._verdicts[case] = Verdict(True, None, "is the reference")
            return
        gate: dict[str, Any] = {"pass": "gate"}
        try:
            given = self.draw(case, self._next_key())
            verdict = self.compare(case, self._compiled(case, given), given)
        except Exception as error:
            self._verdicts[case] = Verdict(False, None, "", _describe(error))
            self.write(case, _failure(error), **gate, note=_describe(error))
            self._stop_if_lost(error)
            return
        self._verdicts[case] = verdict
        found = {"error": verdict.error, "checked": verdict.checked, "note": verdict.reason or None}
        self.write(case, "right" if verdict.passed else "WRONG", **gate, **found)

    def time(self, case: Any) -> None:
        """Writes the case's row: its time if it runs here and its results are right, or why there is none."""
        reason = self.reason_against(case)
        if reason is not None:
            self.write(case, "not run", note=reason)
            return
        self.check(case)
        verdict = self._verdicts.get(self.judged_by(case), Verdict(True, None, "not compared"))
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

    def check_all(self, cases: Sequence[Any], part: float = 1.0) -> None:
        """Checks the cases until this part of the budget is used up; `time` checks the others when their turn comes."""
        for case in cases:
            if self.late(part):
                return
            self.check(case)

    def time_all(self, cases: Sequence[Any]) -> None:
        """Times the cases within the budget; what it does not reach gets a row that says so."""
        for index, case in enumerate(cases):
            if self.late():
                return self.leave_out(cases[index:], "the budget was used up")
            try:
                self.time(case)
            except DeviceLost as error:
                return self.leave_out(cases[index + 1 :], str(error))

    def leave_out(self, cases: Sequence[Any], reason: str) -> None:
        for case in cases:
            self.write(case, "left out", note=reason)

    def measure_copy(self) -> None:
        """The rate at which this device reads and writes: the faster of a copy and a multiplication by two."""
        x = jax.random.normal(self._next_key(), ((2**12 if self.dry else COPIED_BYTES) // 4,))
        for name, function in (("copy", jnp.copy), ("copy_doubled", lambda x: 2 * x)):
            try:
                compiled = jax.jit(function).lower(x).compile()
                timing = self._measure(lambda _, run=compiled: run(x))
            except Exception as error:
                self.write(None, "failed", implementation=name, note=_describe(error))
                continue
            values = {**self._figures(timing, 2 * x.nbytes), "dtype": "float32", "pass": "forward", "share": None}
            self.write(None, self._status(values), implementation=name, **values)
            if values["gb_per_s"]:
                self.copy_gb_per_s = max(self.copy_gb_per_s or 0.0, values["gb_per_s"])

    def _timed(self, case: Any) -> dict[str, Any]:
        moved = self.moved(case)
        count = 2 if self.dry else 1 if moved >= 2**30 else min(64, 2 + ROTATED_BYTES // moved)
        sets = [self.draw(case, self._next_key()) for _ in range(count)]
        compiled = self._compiled(case, sets[0])
        timing = self._measure(lambda index: compiled(*sets[index % count]))
        memory, kept = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
        values = {**self._figures(timing, moved), "input_sets": count, "note": self.remark(case)}
        if memory is not None:
            needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            values["compiled_mib"] = round(needed / 2**20, 1)
        if "peak_bytes_in_use" in kept:  # of the process so far: the allocator cannot be asked to forget
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
        """Never the same twice: each check and each set of inputs is drawn afresh."""
        self._key, key = jax.random.split(self._key)
        return key

    def _compiled(self, case: Any, given: tuple[Any, ...]) -> Any:
        if case not in self._programs:
            self._programs[case] = jax.jit(self.program(case)).lower(*given).compile()
        return self._programs[case]

    def _stop_if_lost(self, error: Exception) -> None:
        try:
            jax.block_until_ready(jnp.ones(8) + 1)
        except Exception:
            raise DeviceLost(f"the device is lost: {_describe(error)}") from error


def _failure(error: Exception) -> str:
    """A card that is too small is no fault of the program."""
    return "out of memory" if "RESOURCE_EXHAUSTED" in str(error) else "failed"


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
