"""What the Mosaic kernels take of an H200, from compilation on a machine without one.

    python -m experiments.kernel_report --only=gspn_t --out=experiments/results

Writes kernel_report.md and kernel_report.csv, a row for each kernel: its tile, registers, shared memory, CTAs, the
instructions in its machine code, and the unit of the card that they keep busy longest. Needs
requirements-gpu-compile.txt and no GPU; a second or two a row. Exit code 1 if a kernel does not compile, spills
registers or asks for more shared memory than there is. No column is a measured time.
"""

import csv
import datetime
import functools
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from experiments import command_line, deviceless, kernel_limits, machine_code, propagation_bytes, provenance
from experiments.kernel_contenders import bytes_moved
from experiments.kernel_limits import Moved, Walk
from experiments.kernel_shapes import CHOSEN, CROSSOVER, LARGER, SHAPES, SHARED, KernelShape, select
from experiments.propagation_bytes import BACKWARD, FORWARD, PASSES, TRAINING
from pallas_kernels import DIRECTIONS
from pallas_kernels.dispatch import PATHS
from pallas_kernels.mosaic import operations, paths
from pallas_kernels.mosaic.forms import Form
from pallas_kernels.up_projection import UpProjection

OPERATIONS = ("from_logits", "from_weights")  # of one direction
ALL_DIRECTIONS = "all"
DTYPES = ("bfloat16", "float16", "float32")
CHAIN = "gspn_xl_generator"  # whose bytes are counted from the proxy on
NOTE = (
    "Nothing here was executed, and no time here was measured. Registers, spills, stack and shared memory are the "
    "assembler's. What is per element is what a thread issues for a pixel and channel that it computes in one "
    "direction, by the text of the line loop: rare paths lie outside of the loop, copies that are skipped count; the "
    "product of tensor cores counts once in as many lines as it makes maps for; a loop that the assembler unrolled to "
    "nothing leaves the columns empty. computed_per_element: with padding and ghost zones. bytes are the least that "
    "the operation moves. The columns in microseconds are arithmetic with nominal rates: how long each unit alone "
    "would work for the whole operation if every launch of it were the row's kernel; limited_by names the slowest. "
    "temporary_bytes are those of the whole program: what it pads and lays out for the kernel, and the state that "
    "launches hand on. A training forward pass writes the four h besides."
)
RATES = (
    f"{kernel_limits.COPY_BANDWIDTH / 1e12} TB/s of memory, about that of a copy on the card; "
    f"{kernel_limits.TENSOR_FLOPS / 1e12:.0f} Tflop/s of tensor cores; {deviceless.MULTIPROCESSORS} multiprocessors at "
    f"{kernel_limits.CLOCK / 1e9} GHz, each with {kernel_limits.ISSUE_LANES // 32} instructions of a warp, "
    f"{kernel_limits.FLOATING_POINT_LANES} floating-point operations, {kernel_limits.SPECIAL_FUNCTION_LANES} special "
    f"functions and {kernel_limits.SHARED_MEMORY_BYTES} bytes of shared memory a cycle"
)
COLUMNS = (
    "shape", "batch", "height", "width", "channels", "weight_channels", "chunk", "rank", "direction", "pass",
    "operation", "dtype", "kernel", "tile", "registers", "spill_bytes", "stack_bytes", "shared_memory", "ctas",
    "threads", "ctas_per_multiprocessor", "computed_per_element", "instructions_per_element",
    "floating_point_per_element", "special_functions_per_element", "shared_memory_bytes_per_element", "tma_loads",
    "temporary_bytes", "bytes", "bytes_per_element", *(f"{unit}_us" for unit in kernel_limits.UNITS), "limited_by",
    "fault", "commit",
)  # fmt: skip
Row = dict[str, Any]


class Case(NamedTuple):
    """What a kernel is compiled for."""

    shape: KernelShape
    direction: str
    pass_: str
    operation: str
    dtype: str

    def __str__(self) -> str:
        return " ".join((self.shape.name, *self[1:]))


def bind(case: Case) -> tuple[Callable[..., Any], list[Any], list[Walk]]:
    """What is compiled, its arguments and the walk of each direction: the place that knows how kernels are called."""
    if case.operation in PATHS:
        return _bind_propagation(case)
    shape, dtype = case.shape, jnp.dtype(case.dtype)
    from_logits = case.operation == "from_logits"
    maps = (shape.batch, shape.height, shape.width, shape.channels)
    x = jax.ShapeDtypeStruct(maps, dtype)
    weights = jax.ShapeDtypeStruct((*maps[:3], 3, shape.weight_channels), dtype if from_logits else jnp.float32)
    kernels = operations.Kernels()
    if case.pass_ == FORWARD:
        function, arguments, loads, stores = kernels.scan_forward, [x, weights, x], (x, x), (x,)
    else:
        function, arguments, loads, stores = kernels.scan_backward, [x, weights, x, x, x], (x, x, x, x), (x, x)
    with deviceless.h200():
        form = Form(case.pass_, x, weights, loads, stores, case.direction, shape.chunk, None, False)
    options = dict(direction=case.direction, chunk=shape.chunk, from_logits=from_logits)
    walks = [Walk.of(form, shape.height, shape.width, False)]
    return functools.partial(function, **options), arguments, walks


def _bind_propagation(case: Case) -> tuple[Callable[..., Any], list[Any], list[Walk]]:
    """Four directions with gate and skip."""
    shape, path, is_forward = case.shape, case.operation, case.pass_ != BACKWARD
    pixels = (shape.batch, shape.height, shape.width)

    def array(*axes: int, dtype: Any = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, dtype)

    x, merge = array(*pixels, shape.channels), array(4, dtype=jnp.float32)
    kernels, options = operations.Kernels(), dict[str, Any](chunk=shape.chunk)
    if path.startswith("low_rank"):
        of_maps: list[Any] = [array(shape.rank, 4, shape.channels)] * 3
        of_logits: Any = array(shape.rank, 4, 3, shape.weight_channels)
        up = UpProjection(of_logits, *of_maps)
        arguments: list[Any] = [x, array(*pixels, shape.rank), up, merge]
        function = kernels.low_rank_forward if is_forward else kernels.low_rank_backward
        options["path"] = path
    else:
        maps = [array(*pixels, 4, shape.channels)] * 3
        arguments = [x, array(*pixels, 4, 3, shape.weight_channels), *maps, merge]
        function = kernels.propagation_forward if is_forward else kernels.propagation_backward
        options |= dict(path=path) if is_forward else {}
    if is_forward:
        options["keep"] = case.pass_ == TRAINING
    else:
        arguments += [[x] * 4, x]
    with deviceless.h200():
        forms = paths.forms(_work(case), path, kernel=FORWARD if is_forward else BACKWARD).forms
    walks = [Walk.of(form, shape.height, shape.width, path.endswith(paths.ON_CHIP)) for form in forms]
    return functools.partial(function, **options), arguments, walks


def _work(case: Case) -> paths.Work:
    shape = case.shape
    rank = shape.rank if case.operation.startswith("low_rank") else 0
    pixels = shape.batch, shape.height, shape.width
    return paths.Work((*pixels, shape.channels), case.dtype, shape.weight_channels, shape.chunk, rank)


def _moved(case: Case) -> Moved:
    """The least that the operation moves."""
    if case.operation in PATHS:
        size = jnp.dtype(case.dtype).itemsize
        return propagation_bytes.moved_by_kernels(case.shape, case.operation, case.pass_, size)
    return Moved(bytes_moved(case.operation, case.shape, case.dtype, case.pass_))


def compile_rows(case: Case) -> list[Row]:
    """A row for each kernel of the case; one with the error where it does not compile."""
    shape, moved = case.shape, _moved(case)
    elements = shape.batch * shape.height * shape.width * shape.channels
    row: Row = dict.fromkeys(COLUMNS, "")
    row.update(shape=shape.name, batch=shape.batch, height=shape.height, width=shape.width, channels=shape.channels)
    row.update(weight_channels=shape.weight_channels, chunk=shape.chunk or "", direction=case.direction)
    if case.operation.startswith("low_rank"):
        row["rank"] = shape.rank
    row.update({"operation": case.operation, "pass": case.pass_, "dtype": case.dtype, "bytes": moved.total})
    row["bytes_per_element"] = round(moved.total / elements, 1)
    row["memory_us"] = _rounded(1e6 * moved.total / kernel_limits.COPY_BANDWIDTH)
    try:
        function, arguments, walks = bind(case)
        row["tile"] = "; ".join(dict.fromkeys(str(walk.form.tile) for walk in walks))
        compilation = deviceless.compile_for_h200(function, *arguments)
    except Exception as error:  # whatever stops a compiler is a result here
        return [row | {"fault": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]
    if not compilation.kernels:
        return [row | {"fault": "no Mosaic kernel in the program"}]
    memory = compilation.compiled.memory_analysis()
    row["temporary_bytes"] = memory.temp_size_in_bytes if memory is not None else ""
    return [row | _describe(kernel, walks, moved, elements) for kernel in compilation.kernels]


def _describe(kernel: deviceless.Kernel, walks: Sequence[Walk], moved: Moved, elements: int) -> Row:
    """Columns of one kernel of an operation on a map of `elements` pixels times channels."""
    faults, counts = [], {}
    walks = kernel_limits.as_all(kernel, walks)
    try:
        if (mix := kernel_limits.per_element(kernel, walks)) is not None:
            counts = _counts(mix, kernel_limits.microseconds(mix, walks, moved, elements))
    except LookupError as error:
        faults.append(str(error))
    if kernel.spill_bytes:
        faults.append(f"spills {kernel.spill_bytes} bytes")
    if kernel.shared_memory > deviceless.SHARED_MEMORY_PER_CTA:
        faults.append(f"asks for more than {deviceless.SHARED_MEMORY_PER_CTA} bytes of shared memory")
    elif not kernel.ctas_per_multiprocessor:
        faults.append("takes more registers than a multiprocessor has")
    return counts | {
        "kernel": kernel.name,
        "tile": str(walks[0].form.tile),
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "stack_bytes": kernel.stack_bytes,
        "shared_memory": kernel.shared_memory,
        "ctas": kernel.ctas,
        "threads": kernel.threads,
        "ctas_per_multiprocessor": kernel.ctas_per_multiprocessor,
        "computed_per_element": round(sum(walk.elements for walk in walks) / (len(walks) * elements), 2),
        "tma_loads": kernel.count("UTMALDG"),
        "fault": "; ".join(faults),
    }


def _counts(mix: machine_code.Mix, times: Mapping[str, float]) -> Row:
    return {
        "instructions_per_element": round(mix.instructions, 1),
        "floating_point_per_element": round(mix.floating_point, 1),
        "special_functions_per_element": round(mix.special_functions, 2),
        "shared_memory_bytes_per_element": round(mix.shared_memory + mix.tensor_operands, 1),
        "limited_by": max(times, key=lambda unit: times[unit]),
        **{f"{unit}_us": _rounded(time) for unit, time in times.items()},
    }


def _rounded(time: float) -> float:
    return float(f"{time:.4g}")


def cases(
    shapes: Iterable[KernelShape], directions: Sequence[str], dtypes: Sequence[str], only: str = ""
) -> list[Case]:
    """All combinations that there are, those alone whose text contains `only`."""
    scans = [(direction, operation) for direction in directions for operation in OPERATIONS]
    listed = (
        Case(shape, direction, pass_, operation, dtype)
        for shape in shapes
        for dtype in dtypes
        for direction, operation in (
            *([] if shape in (*LARGER, *CROSSOVER, *SHARED) else scans),
            *([(ALL_DIRECTIONS, path) for path in PATHS] if shape in CHOSEN else []),
        )
        for pass_ in PASSES
    )
    return [case for case in listed if only in str(case) and exists(case)]


def exists(case: Case) -> bool:
    """Whether there is such a kernel: on chip forward alone, where the map fits; of a proxy in 16 bits alone."""
    if case.operation not in PATHS:
        return case.pass_ != TRAINING  # whose h is the result
    if case.operation.startswith("low_rank") and case.dtype == "float32":
        return False
    if not case.operation.endswith(paths.ON_CHIP):
        return True
    try:
        with deviceless.h200():
            return case.pass_ != BACKWARD and bool(paths.forms(_work(case), case.operation))
    except ValueError:  # no tile serves the map
        return False


def run(listed: Sequence[Case], out: str) -> list[Row]:
    """Compiles all cases, writes both tables into the folder `out` and returns the rows.

    The rows of other cases that the tables there hold stay, with their commit.
    """
    commit = provenance.commit()
    about = {
        "command": f"python -m experiments.kernel_report {shlex.join(sys.argv[1:])}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "compiled for": f"{deviceless.DEVICE_KIND}, with jax {jax.__version__} and ptxas "
        f"{deviceless.assembler_version()}",
        "rates": RATES,
        "whole train steps": "their peak memory stands in step_report.md, from python -m experiments.step_report",
        "note": NOTE,
    }
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # before the minutes that compilation takes
    rows = []
    for number, case in enumerate(listed, 1):
        found = [row | {"commit": commit} for row in compile_rows(case)]
        rows += found
        print(f"{number}/{len(listed)} {case}: {'; '.join(row['fault'] for row in found if row['fault']) or 'right'}")
    written = sorted([row for row in _read(folder / "kernel_report.csv") if _key(row) not in map(_key, rows)] + rows,
                     key=_place)  # fmt: skip
    with open(folder / "kernel_report.csv", "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(written)
    (folder / "kernel_report.md").write_text(_markdown(about, written))
    return rows


def _read(path: pathlib.Path) -> list[Row]:
    """The rows of a table, as text; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list[Row](csv.DictReader(line for line in file if not line.startswith("# ")))


def _key(row: Row) -> tuple[str, ...]:
    """What a row's case is told by."""
    return row["shape"], row["direction"], row["pass"], row["operation"], row["dtype"]


def _place(row: Row) -> tuple[int, ...]:
    """Where a case stands in the table."""
    order = [shape.name for shape in SHAPES], [*DIRECTIONS, ALL_DIRECTIONS], [*OPERATIONS, *PATHS], PASSES, DTYPES
    values = row["shape"], row["direction"], row["operation"], row["pass"], row["dtype"]
    return tuple(
        known.index(value) if value in known else len(known) for value, known in zip(values, order, strict=True)
    )


def _markdown(about: dict[str, str], rows: Sequence[Row]) -> str:
    lines = ["# Kernels, compiled for an H200", "", *(f"- {key}: {about[key]}" for key in about), ""]
    lines += [*propagation_bytes.markdown(select([CHAIN])[0]), "", "## Kernels", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(str(row[key]).replace("|", "\\|") for key in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    flags.DEFINE_string("only", "", 'Part of "SHAPE DIRECTION PASS OPERATION DTYPE": only rows that contain it.')
    flags.DEFINE_integer("every", 1, "Of the rows every so many-th alone.", lower_bound=1)
    flags.DEFINE_string("out", "experiments/results", "Folder for the two tables.")
    flags.DEFINE_multi_enum(
        "direction", ["right", "down"], DIRECTIONS, "May be repeated. Left and up differ by a sign."
    )
    flags.DEFINE_multi_enum("dtype", ["bfloat16"], DTYPES, "Of everything but weights; may be repeated.")


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    reason = deviceless.missing()
    if reason is not None:
        raise ValueError(reason)
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for the libraries to run on a GPU, and gives up
    chosen = flags.FLAGS
    listed = cases(SHAPES, chosen.direction, chosen.dtype, chosen.only)[:: chosen.every]
    if not listed:
        raise ValueError(f"only: no row contains {chosen.only!r}")
    rows = run(listed, chosen.out)
    print(f"{len(rows)} rows written to {chosen.out}/kernel_report.md and .csv.")
    faulty = [row for row in rows if row["fault"]]
    if faulty:
        raise ValueError(f"{len(faulty)} of {len(rows)} rows have a fault, the first of {faulty[0]['shape']}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
