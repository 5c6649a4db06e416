"""Checks and times cases of the benchmark of the kernels, and writes a row for each.

Imports jax and pallas_kernels only, beside the benchmark's own files.
"""

import csv
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from experiments import device_time
from experiments.kernel_cases import Case, arguments, program
from experiments.kernel_contenders import HEAD_WIDTH, attention_heads, bytes_moved, draw_inputs, reason_against
from experiments.kernel_gate import Verdict, check

COLUMNS: Sequence[str] = (
    "shape batch height width channels weight_channels direction chunk dtype pass implementation status median_ms "
    "spread_ms runs clock host_ms bytes gb_per_s share compiled_mib process_peak_mib error checked input_sets note"
).split()
# The inputs and results of a round through all input sets exceed 60 MB of cache several times.
ROTATED_BYTES = 2**28
COPIED_BYTES = 2**31


class DeviceLost(RuntimeError):
    """After a faulty access the GPU serves this process no more; whatever else would only fail."""


class Benchmark:
    """Checks and times cases one at a time, and writes a row for each."""

    def __init__(self, file: TextIO, *, clock: str, dry: bool, runs: int, seed: int, budget_s: float = math.inf):
        self.file, self.writer = file, csv.DictWriter(file, COLUMNS, restval="")
        self.clock, self.dry, self.runs = clock, dry, runs
        self.start, self.budget_s = time.monotonic(), budget_s
        self.rows: list[dict[str, Any]] = []
        self.copy_gb_per_s: float | None = None
        self._key = jax.random.key(seed)
        self._verdicts: dict[Case, Verdict] = {}
        self._programs: dict[Case, Any] = {}
        self.writer.writeheader()

    def late(self, part: float = 1.0) -> bool:
        """Whether this part of the budget is used up."""
        return time.monotonic() - self.start > part * self.budget_s

    def write(self, case: Case | None, status: str, **values: Any) -> None:
        row: dict[str, Any] = {**dict.fromkeys(COLUMNS), "status": status}
        if case is not None:
            shape = case.shape
            row.update(shape=shape.name, batch=shape.batch, height=shape.height, width=shape.width)
            row.update(channels=shape.channels, weight_channels=shape.weight_channels, direction=case.direction)
            row.update(chunk=case.chunk, dtype=case.dtype, implementation=case.contender.name)
            row["pass"] = case.pass_
        row.update(values)
        self.rows.append(row)
        self.writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        self.file.flush()
        shown = {key: row[key] for key in ("median_ms", "spread_ms", "gb_per_s", "share", "error", "note")}
        figures = [f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in shown.items() if value]
        print(f"{status}:", case or row["implementation"], row["pass"] if case is None else "", *figures, flush=True)

    def check(self, case: Case) -> None:
        """Writes the gate's row for the case's results and gradients, and keeps the verdict. Does it once."""
        case = case.whole
        if case in self._verdicts or not case.contender.scans:
            return
        reason = reason_against(case.contender, case.shape, case.dtype, "both")
        if reason is not None:
            return
        if case.contender.implementation == "xla":
            self._verdicts[case] = Verdict(True, None, "is the reference")
            return
        gate: dict[str, Any] = {"pass": "gate"}
        try:
            inputs = self._inputs(case)
            both = self._compiled(case, tuple(inputs))
            verdict = check(case, both, inputs)
        except Exception as error:
            self._verdicts[case] = Verdict(False, None, "", _describe(error))
            self.write(case, "failed", **gate, note=_describe(error))
            self._stop_if_lost(error)
            return
        self._verdicts[case] = verdict
        found = {"error": verdict.error, "checked": verdict.checked, "note": verdict.reason or None}
        self.write(case, "right" if verdict.passed else "WRONG", **gate, **found)

    def time(self, case: Case) -> None:
        """Writes the case's row: its time if it runs here and its results are right, or why there is none."""
        reason = reason_against(case.contender, case.shape, case.dtype, case.pass_)
        if reason is not None:
            self.write(case, "not run", note=reason)
            return
        self.check(case)
        verdict = self._verdicts.get(case.whole, Verdict(True, None, "not compared"))
        if not verdict.passed:
            self.write(case, "refused", error=verdict.error, checked=verdict.checked, note=verdict.reason)
            return
        try:
            values = self._timed(case)
        except Exception as error:
            self.write(case, "failed", note=_describe(error))
            self._stop_if_lost(error)
            return
        self.write(case, self._status(values), **values, error=verdict.error, checked=verdict.checked)

    def check_all(self, cases: Sequence[Case], part: float = 1.0) -> None:
        """Checks the cases until this part of the budget is used up; `time` checks the others when their turn comes."""
        for case in cases:
            if self.late(part):
                return
            self.check(case)

    def time_all(self, cases: Sequence[Case]) -> None:
        """Times the cases within the budget; what it does not reach gets a row that says so."""
        for index, case in enumerate(cases):
            if self.late():
                return self.leave_out(cases[index:], "the budget was used up")
            try:
                self.time(case)
            except DeviceLost as error:
                return self.leave_out(cases[index + 1 :], str(error))

    def leave_out(self, cases: Sequence[Case], reason: str) -> None:
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

    def _timed(self, case: Case) -> dict[str, Any]:
        moved = bytes_moved(case.contender.operation, case.shape, case.dtype, case.pass_)
        count = 2 if self.dry else 1 if moved >= 2**30 else min(64, 2 + ROTATED_BYTES // moved)
        sets = [arguments(case, self._inputs(case)) for _ in range(count)]
        compiled = self._compiled(case, sets[0])
        timing = self._measure(lambda index: compiled(*sets[index % count]))
        memory, kept = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
        values = {**self._figures(timing, moved), "input_sets": count}
        if not case.contender.scans:
            values["note"] = f"{attention_heads(case.shape)} heads of {HEAD_WIDTH} for {case.shape.channels} channels"
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

    def _inputs(self, case: Case) -> list[jax.Array]:
        direction = case.direction or "down"
        return draw_inputs(self._next_key(), case.contender.operation, case.shape, case.dtype, direction)

    def _compiled(self, case: Case, given: tuple[Any, ...]) -> Any:
        if case not in self._programs:
            self._programs[case] = jax.jit(program(case)).lower(*given).compile()
        return self._programs[case]

    def _stop_if_lost(self, error: Exception) -> None:
        try:
            jax.block_until_ready(jnp.ones(8) + 1)
        except Exception:
            raise DeviceLost(f"the device is lost: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
