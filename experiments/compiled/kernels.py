"""Registers, spills and shared memory of the Mosaic kernels on an H200, compiled on a machine without one.

    python -m experiments.compiled.kernels --only=gspn_t --output=experiments/results/kernel_report

Writes OUTPUT.csv with a row for each kernel, and OUTPUT.md with a summary. Needs requirements-gpu-compile.txt and no
GPU; a row takes a few seconds. Exit code 1 if a kernel does not compile, spills registers, asks for more shared
memory than there is, or breaks the order that `order` checks. No column is a measured time.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags

from experiments import command_line, tables
from experiments.benchmarks.options import chosen
from experiments.benchmarks.shapes import CHOSEN, CROSSOVER, LARGER, SHAPES, SHARED, UNETS, KernelShape
from experiments.compiled import report
from experiments.compiled.report import Report, Row
from pallas_kernels import DIRECTIONS, UpProjection
from pallas_kernels.choices import VARIANTS
from pallas_kernels.mosaic import compile_only, layouts, operations, order
from pallas_kernels.mosaic.card import H200
from pallas_kernels.mosaic.compile_only import Kernel
from pallas_kernels.mosaic.layouts import Layout
from pallas_kernels.mosaic.tiles import Tile
from pallas_kernels.mosaic.variants import ON_CHIP

FROM_WEIGHTS = "from_weights"
SCANS = ("from_logits", FROM_WEIGHTS)  # in one direction
ALL_DIRECTIONS = "all"
DTYPES = ("bfloat16", "float16", "float32")
FORWARD, TRAINING, BACKWARD = "forward", "training forward", "backward"  # the second keeps h for the third
PASSES = (FORWARD, TRAINING, BACKWARD)
NOTE = (
    "Compiled, not executed. Registers, spills and stack are per thread, shared memory per CTA, by the assembler's "
    "report. temporary_bytes belong to the whole program: padding, layouts for the kernel, each direction's share of a "
    "result, and the state that launches hand on. Each row names its commit."
)
COLUMNS = (
    "shape", "batch", "height", "width", "channels", "weight_channels", "chunk", "rank", "direction", "pass",
    "operation", "dtype", "kernel", "tile", "registers", "spill_bytes", "stack_bytes", "shared_memory", "ctas",
    "threads", "ctas_per_multiprocessor", "tma_loads", "temporary_bytes", "fault", "commit", "date",
)  # fmt: skip
ORDER = {
    "shape": [shape.name for shape in SHAPES],
    "direction": [*DIRECTIONS, ALL_DIRECTIONS],
    "operation": [*SCANS, *VARIANTS],
    "pass": PASSES,
    "dtype": DTYPES,
}


class Program(NamedTuple):
    """Kernels to compile: those of a line scan, or of a variant of the propagation without the passes around them."""

    shape: KernelShape
    direction: str
    pass_: str
    operation: str
    dtype: str

    def __str__(self) -> str:
        return " ".join((self.shape.name, *self[1:]))

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS if self.direction == ALL_DIRECTIONS else (self.direction,)

    @property
    def rank(self) -> int:
        """The rank of the proxy from which the kernels make maps; 0 where they read maps."""
        return self.shape.rank if self.operation.startswith("low_rank") else 0


def programs(shapes: Iterable[KernelShape], directions: Sequence[str], dtypes: Sequence[str]) -> list[Program]:
    """Returns all combinations that exist; of those with the same kernels, such as layers that differ in rank, one."""
    scans = [(direction, operation) for direction in directions for operation in SCANS]
    listed = (
        Program(shape, direction, pass_, operation, dtype)
        for shape in shapes
        for dtype in dtypes
        for direction, operation in (
            *([] if shape in (*LARGER, *CROSSOVER, *SHARED, *UNETS) else scans),
            *([(ALL_DIRECTIONS, variant) for variant in VARIANTS] if shape in CHOSEN else []),
        )
        for pass_ in PASSES
    )
    different: dict[Any, Program] = {}
    for program in filter(exists, listed):
        sizes = dataclasses.replace(program.shape, name="", rank=program.rank)
        different.setdefault((sizes, *program[1:]), program)
    return list(different.values())


def exists(program: Program) -> bool:
    """Says whether there are such kernels: on-chip ones serve only the forward pass, low-rank ones only 16 bits."""
    if not program.operation.startswith("low_rank"):
        return program.pass_ != TRAINING  # the result of a scan is h
    if program.dtype == "float32":
        return False
    if not program.operation.endswith(ON_CHIP):
        return True
    return program.pass_ != BACKWARD and _layout(program) is not None


def bind(program: Program) -> tuple[Callable[..., Any], list[Any], list[Tile]]:
    """Returns the function to compile, its arguments and the tile of each launch.

    Raises:
        ValueError: no tile serves the map.
    """
    layout = _layout(program)
    if layout is None:
        raise ValueError(f"shape: expected a map that some tile fits, got {program}")
    shape, kernels, kernel = program.shape, operations.Kernels(), _kernel(program)
    pixels, channels, count = (shape.batch, shape.height, shape.width), shape.channels, len(program.directions)

    def array(*axes: int, dtype: str = program.dtype) -> Any:
        return jax.ShapeDtypeStruct(axes, dtype)

    x, states = array(*pixels, channels), array(shape.batch, count, shape.height, shape.width, channels)
    options = dict[str, Any](chunk=shape.chunk)
    if program.rank:
        up: Any = UpProjection(array(shape.rank, 4, 3, shape.weight_channels), *[array(shape.rank, 4, channels)] * 3)
        arguments: list[Any] = [x, array(*pixels, shape.rank), up, array(4, dtype="float32")]
        function = kernels.low_rank_forward if kernel == "forward" else kernels.low_rank_backward
        options |= dict(variant=program.operation)
        options |= dict(keep=program.pass_ == TRAINING) if kernel == "forward" else {}
        states, grad = (states,), x
    else:
        weights = array(*pixels, count, 3, shape.weight_channels, dtype=_dtype_of_weights(program))
        arguments = [x, weights, array(*pixels, count, channels)]
        function = kernels.scan_forward if kernel == "forward" else kernels.scan_backward
        options |= dict(directions=program.directions, from_logits=program.operation != FROM_WEIGHTS)
        grad = states
    arguments += [states, grad] if kernel == "backward" else []
    return functools.partial(function, **options), arguments, [tile for _, _, tile in layout.launches]


def _kernel(program: Program) -> str:
    return "backward" if program.pass_ == BACKWARD else "forward"


def _dtype_of_weights(program: Program) -> str:
    return "float32" if program.operation == FROM_WEIGHTS else program.dtype


def _layout(program: Program) -> Layout | None:
    """Returns how the launches are tiled on an H200; None where no tile fits."""
    shape, kernel = program.shape, _kernel(program)
    x = jax.ShapeDtypeStruct((shape.batch, shape.height, shape.width, shape.channels), program.dtype)
    if program.rank:
        on_chip = program.operation.endswith(ON_CHIP)
        kind = layouts.low_rank_kind(kernel, x, program.rank, keep=program.pass_ == TRAINING, on_chip=on_chip)
    else:
        kind = layouts.scan_kind(kernel, x, jax.ShapeDtypeStruct((), _dtype_of_weights(program)), x)
    with compile_only.h200():
        return layouts.lay_out(kind, x.shape, shape.weight_channels, program.directions, shape.chunk, interpret=False)


def compile_rows(program: Program) -> list[Row]:
    """Returns a row for each kernel of the program; one with the error where it does not compile."""
    shape = program.shape
    row: Row = dict.fromkeys(COLUMNS, "")
    row.update(shape=shape.name, batch=shape.batch, height=shape.height, width=shape.width, channels=shape.channels)
    row.update(weight_channels=shape.weight_channels, chunk=shape.chunk or "", direction=program.direction)
    row.update({"operation": program.operation, "pass": program.pass_, "dtype": program.dtype})
    if program.rank:
        row["rank"] = program.rank
    try:
        function, arguments, tiles = bind(program)
        row["tile"] = "; ".join(dict.fromkeys(map(str, tiles)))
        compilation = compile_only.compile_for_h200(function, *arguments)
    except Exception as error:  # whatever stops a compiler is a result of the report
        return [row | {"fault": report.error_text(error)}]
    if not compilation.kernels:
        return [row | {"fault": "no Mosaic kernel in the program"}]
    memory = compilation.compiled.memory_analysis()
    row["temporary_bytes"] = memory.temp_size_in_bytes if memory is not None else ""
    stores = max(tile.stores for tile in tiles)
    return [row | resources(kernel, stores) for kernel in compilation.kernels]


def resources(kernel: Kernel, stores: int) -> Row:
    """Returns the columns of one kernel, whose tile has this many `stores`."""
    faults = order.violations(kernel.code, stores)
    if kernel.spill_bytes:
        faults.append(f"spills {kernel.spill_bytes} bytes")
    if kernel.shared_memory > H200.shared_memory:
        faults.append(f"asks for more than {H200.shared_memory} bytes of shared memory")
    elif not kernel.ctas_per_multiprocessor:
        faults.append("takes more registers than a multiprocessor has")
    names = ("registers", "spill_bytes", "stack_bytes", "shared_memory", "ctas", "threads", "ctas_per_multiprocessor")
    values = {name: getattr(kernel, name) for name in names}
    return values | {"kernel": kernel.name, "tma_loads": kernel.count("UTMALDG"), "fault": "; ".join(faults)}


def page(about: Mapping[str, str], rows: Sequence[Row]) -> str:
    """Returns the summary in Markdown: a line for each operation and pass."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["operation"], row["pass"]), []).append(row)

    def span(group: Sequence[Row], column: str, unit: int = 1) -> str:
        values = [int(row[column]) / unit for row in group if row[column] != ""]
        return f"{min(values):.0f} to {max(values):.0f}" if values else ""

    heads = ("operation", "pass", "rows", "registers", "spill bytes", "shared memory, KiB", "CTAs per SM", "faults")
    order = sorted(groups, key=lambda key: (ORDER["operation"].index(key[0]), PASSES.index(key[1])))
    cells = [
        (*key, len(group), span(group, "registers"), span(group, "spill_bytes"), span(group, "shared_memory", 1024),
         span(group, "ctas_per_multiprocessor"), sum(bool(row["fault"]) for row in group))
        for key, group in ((key, groups[key]) for key in order)
    ]  # fmt: skip
    shapes = len({row["shape"] for row in rows})
    text = f"The least and the largest value over {len(rows)} kernels at {shapes} maps. The CSV holds every kernel."
    return report.header("Kernels, compiled for an H200", about) + f"{text}\n\n{tables.markdown(heads, cells)}\n"


REPORT = Report(compile_rows, COLUMNS, ORDER, page, NOTE)


def define_flags() -> None:
    report.define_flags("kernel_report")
    flags.DEFINE_list("directions", ["right", "down"], "Directions of scans; left and up differ by a sign.")
    flags.DEFINE_list("dtypes", ["bfloat16"], f"Dtypes of everything but weights: some of {', '.join(DTYPES)}.")


def main() -> None:
    listed = programs(SHAPES, chosen("directions", DIRECTIONS), chosen("dtypes", DTYPES))
    rows = REPORT.run(report.chosen(listed), flags.FLAGS.output)
    report.refuse_faults(rows, lambda row: f"{row['shape']} {row['operation']} {row['pass']}: {row['fault']}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
