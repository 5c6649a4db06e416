"""What the reports of whole programs share: a row with memory, bytes, FLOPs and compile time, and the table of rows."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments import tables
from experiments.compiled import costs, report
from experiments.compiled.report import Row
from pallas_kernels.mosaic import card

COLUMNS = (
    "compile_s", "compile_cpu_s", "launches", "bytes", "flops", "least_ms", "argument_bytes", "output_bytes",
    "alias_bytes", "temporary_bytes", "peak_bytes", "commit", "date", "fault",
)  # fmt: skip
NOTE = (
    "Compiled, not executed: nothing here is a measured time. least_ms adds up, over all instructions, the longer of "
    f"two times: operands and results at {card.COPY_BANDWIDTH / 1e12} TB/s; matrix products and convolutions at "
    f"{card.MATRIX_FLOPS / 1e12:.0f} TFLOP/s, depthwise ones at {card.VECTOR_FLOPS / 1e12:.0f}. Caches, starts of "
    "kernels and other arithmetic are left out; without a card XLA tunes no product and no convolution. compile_s was "
    "taken on two cores that other programs used too; compile_cpu_s are the processor's seconds, ptxas among them."
)
_BYTES = ("argument_bytes", "output_bytes", "alias_bytes", "temporary_bytes", "peak_bytes")


def compiled_row(compile_program: Callable[[], jax.stages.Compiled]) -> Row:
    """Returns the values of `COLUMNS` but for commit and date; only the error where the program does not compile."""
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    try:
        compiled = compile_program()
    except Exception as error:  # whatever stops a compiler is a result of the report
        return {"fault": report.error_text(error)}
    row: Row = {"compile_s": round(time.perf_counter() - started, 1)}
    row["compile_cpu_s"] = round(_cpu_seconds() - cpu_started, 1)
    memory: Any = compiled.memory_analysis()
    row |= {"argument_bytes": memory.argument_size_in_bytes, "output_bytes": memory.output_size_in_bytes}
    row |= {"alias_bytes": memory.alias_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes}
    return row | {"peak_bytes": memory.peak_memory_in_bytes} | costs.totals(compiled.as_text() or "")


def _cpu_seconds() -> float:
    """Returns the seconds that all cores have worked for this process and for the programs that it has called."""
    return sum(os.times()[:4])


def table(heads: Sequence[str], name: Callable[[Mapping[str, str]], Sequence[str]], rows: Sequence[Row]) -> str:
    """Returns the rows in Markdown; `name` takes a row to the cells of `heads`, which come first."""
    others = ("least_ms", "launches", "compile_s", "compile_cpu_s", "commit", "date", "fault")
    giga = (f"{key.removesuffix('_bytes')}, GB" for key in _BYTES)
    cells = [
        (*name(row), *(f"{int(row[key]) / 1e9:.2f}" if row[key] else "" for key in (*_BYTES, "bytes")),
         f"{int(row['flops']) / 1e12:.1f}" if row["flops"] else "", *(row[key] for key in others))
        for row in rows
    ]  # fmt: skip
    return tables.markdown((*heads, *giga, "moved, GB", "TFLOP", *others), cells) + "\n"
