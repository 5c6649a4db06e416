"""Checks and times cases of the benchmark of the kernels, and writes a row for each.

Imports jax and pallas_kernels only, beside the benchmark's own files.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.kernel_cases import Case, arguments, program
from experiments.kernel_contenders import HEAD_WIDTH, attention_heads, bytes_moved, draw_inputs, reason_against
from experiments.kernel_gate import Verdict, check
from experiments.measurement import Measurement

COLUMNS: Sequence[str] = (
    "shape batch height width channels weight_channels direction chunk dtype pass implementation status median_ms "
    "spread_ms runs clock host_ms bytes gb_per_s share compiled_mib process_peak_mib error checked input_sets note"
).split()


class Benchmark(Measurement):
    """Of line scans by every implementation, and of attention, which is not compared."""

    columns = COLUMNS

    def describe(self, case: Case) -> dict[str, Any]:
        shape = case.shape
        return {
            "shape": shape.name, "batch": shape.batch, "height": shape.height, "width": shape.width,
            "channels": shape.channels, "weight_channels": shape.weight_channels, "direction": case.direction,
            "chunk": case.chunk, "dtype": case.dtype, "implementation": case.contender.name, "pass": case.pass_,
        }  # fmt: skip

    def reason_against(self, case: Case) -> str | None:
        return reason_against(case.contender, case.shape, case.dtype, case.pass_)

    def judged_by(self, case: Case) -> Case | None:
        return case.whole if case.contender.scans else None

    def is_reference(self, case: Case) -> bool:
        return case.contender.implementation == "xla"

    def compare(self, case: Case, program: Callable[..., Any], given: tuple[Any, ...]) -> Verdict:
        return check(case, program, given)

    def program(self, case: Case) -> Callable[..., Any]:
        return program(case)

    def draw(self, case: Case, key: jax.Array) -> tuple[Any, ...]:
        direction = case.direction or "down"
        return arguments(case, draw_inputs(key, case.contender.operation, case.shape, case.dtype, direction))

    def moved(self, case: Case) -> int:
        return bytes_moved(case.contender.operation, case.shape, case.dtype, case.pass_)

    def remark(self, case: Case) -> str | None:
        if case.contender.scans:
            return None
        return f"{attention_heads(case.shape)} heads of {HEAD_WIDTH} for {case.shape.channels} channels"
