"""What the Mosaic kernels take of an H200, from compilation on a machine without one.

    python -m experiments.kernel_report --only=gspn_t --out=experiments/results

Writes kernel_report.md and kernel_report.csv, a row for each kernel: its tile, registers, shared memory, CTAs, and the
instructions in its machine code. Needs requirements-gpu-compile.txt and no GPU; about a second a row. Exit code 1 if a
kernel does not compile, spills registers or asks for more shared memory than there is. No column is a measured time.
"""

import csv
import datetime
import functools
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from experiments import command_line, deviceless, provenance
from experiments.kernel_contenders import bytes_moved
from experiments.kernel_shapes import LAYERS, SHAPES, KernelShape
from pallas_kernels import DIRECTIONS
from pallas_kernels.mosaic import operations, paths, tiles
from pallas_kernels.mosaic.forms import Form

COPY_BANDWIDTH = 4.3e12  # bytes a second that a copy reads and writes on an H200; its data sheet says 4.8e12
PASSES = ("forward", "backward")
OPERATIONS = ("from_logits", "from_weights")  # of one direction
PROPAGATION, ALL_DIRECTIONS = "propagate", "all"
DTYPES = ("bfloat16", "float16", "float32")
NOTE = (
    "Nothing here was executed. Registers, spills, stack and shared memory are the assembler's; instructions per "
    "element are those in the text of the line loop, an estimate of what a thread issues for an element: rare paths "
    "lie outside of the loop, copies that are skipped count. limit_us is the time in which a copy would move the "
    "bytes that the operation must move: no prediction. temporary_bytes are those of the whole program: what it pads "
    "and lays out for the kernel, and the state that launches hand on."
)
COLUMNS = (
    "shape", "batch", "height", "width", "channels", "weight_channels", "chunk", "direction", "pass", "operation",
    "dtype", "kernel", "tile", "registers", "spill_bytes", "stack_bytes", "shared_memory", "ctas", "threads",
    "ctas_per_multiprocessor", "instructions_per_element", "tma_loads", "temporary_bytes", "bytes", "limit_us", "fault",
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


def bind(case: Case) -> tuple[Callable[..., Any], list[Any], list[tiles.Tile]]:
    """What is compiled, its arguments and the tiles that it takes: the one place that knows how kernels are called."""
    shape, dtype = case.shape, jnp.dtype(case.dtype)
    if case.operation == PROPAGATION:
        return _bind_propagation(case)
    from_logits = case.operation == "from_logits"
    maps = (shape.batch, shape.height, shape.width, shape.channels)
    x = jax.ShapeDtypeStruct(maps, dtype)
    weights = jax.ShapeDtypeStruct((*maps[:3], 3, shape.weight_channels), dtype if from_logits else jnp.float32)
    kernels = operations.Kernels()
    if case.pass_ == "forward":
        function, arguments, loads, stores = kernels.scan_forward, [x, weights, x], (x, x), (x,)
    else:
        function, arguments, loads, stores = kernels.scan_backward, [x, weights, x, x, x], (x, x, x, x), (x, x)
    with deviceless.h200():
        form = Form(case.pass_, x, weights, loads, stores, case.direction, shape.chunk, None, False)
    options = dict(direction=case.direction, chunk=shape.chunk, from_logits=from_logits)
    return functools.partial(function, **options), arguments, [form.tile]


def _bind_propagation(case: Case) -> tuple[Callable[..., Any], list[Any], list[tiles.Tile]]:
    """Four directions with gate and skip; forward without the four h, as in inference."""
    shape, dtype = case.shape, jnp.dtype(case.dtype)
    pixels = (shape.batch, shape.height, shape.width)
    x = jax.ShapeDtypeStruct((*pixels, shape.channels), dtype)
    logits = jax.ShapeDtypeStruct((*pixels, 4, 3, shape.weight_channels), dtype)
    maps = [jax.ShapeDtypeStruct((*pixels, 4, shape.channels), dtype)] * 3
    arguments = [x, logits, *maps, jax.ShapeDtypeStruct((4,), jnp.float32)]
    kernels, options = operations.Kernels(), dict[str, Any](chunk=shape.chunk)
    with deviceless.h200():
        work = paths.Work((*pixels, shape.channels), case.dtype, shape.weight_channels, shape.chunk)
        forms = paths.forms(work, "fused", kernel=case.pass_).forms
    if case.pass_ == "forward":
        function = functools.partial(kernels.propagation_forward, keep=False, **options)
    else:
        function, arguments = functools.partial(kernels.propagation_backward, **options), [*arguments, [x] * 4, x]
    return function, arguments, [form.tile for form in forms]


def _bytes(case: Case) -> int:
    """The least that the operation moves; of propagation, by a launch for each direction that adds to a float32 sum."""
    if case.operation != PROPAGATION:
        return bytes_moved(case.operation, case.shape, case.dtype, case.pass_)
    shape, size = case.shape, jnp.dtype(case.dtype).itemsize
    maps = shape.batch * shape.height * shape.width * shape.channels
    weights = 3 * maps * shape.weight_channels // shape.channels
    each = 4 * maps + weights if case.pass_ == "forward" else 9 * maps + 2 * weights
    return 4 * each * size + (24 + size) * maps  # the sum is written 3 times and read 3 times, then the result written


def compile_rows(case: Case) -> list[Row]:
    """A row for each kernel of the case; one with the error where it does not compile."""
    shape = case.shape
    moved = _bytes(case)
    row: Row = dict.fromkeys(COLUMNS, "")
    row.update(shape=shape.name, batch=shape.batch, height=shape.height, width=shape.width, channels=shape.channels)
    row.update(weight_channels=shape.weight_channels, chunk=shape.chunk or "", direction=case.direction)
    row.update({"operation": case.operation, "pass": case.pass_, "dtype": case.dtype, "bytes": moved})
    row["limit_us"] = float(f"{1e6 * moved / COPY_BANDWIDTH:.4g}")
    try:
        function, arguments, tiles_of_case = bind(case)
        row["tile"] = "; ".join(dict.fromkeys(str(tile) for tile in tiles_of_case))
        compilation = deviceless.compile_for_h200(function, *arguments)
    except Exception as error:  # whatever stops a compiler is a result here
        return [row | {"fault": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]
    if not compilation.kernels:
        return [row | {"fault": "no Mosaic kernel in the program"}]
    memory = compilation.compiled.memory_analysis()
    row["temporary_bytes"] = memory.temp_size_in_bytes if memory is not None else ""
    return [row | _describe(kernel, tiles_of_case) for kernel in compilation.kernels]


def _describe(kernel: deviceless.Kernel, tiles_of_case: Sequence[tiles.Tile]) -> Row:
    # The results of a line are one group of stores; a thread has the tile's share of them. Which kernel of several has
    # which tile is not known: the number is left out where it would matter.
    shares = {tile.rows * tile.channels / 128 for tile in tiles_of_case}
    elements = kernel.groups_of_loop * shares.pop() if len(shares) == 1 else 0
    instructions = round(sum(kernel.loop_opcodes.values()) / elements, 1) if elements else ""
    faults = []
    if kernel.spill_bytes:
        faults.append(f"spills {kernel.spill_bytes} bytes")
    if kernel.shared_memory > deviceless.SHARED_MEMORY_PER_CTA:
        faults.append(f"asks for more than {deviceless.SHARED_MEMORY_PER_CTA} bytes of shared memory")
    elif not kernel.ctas_per_multiprocessor:
        faults.append("takes more registers than a multiprocessor has")
    return {
        "kernel": kernel.name,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "stack_bytes": kernel.stack_bytes,
        "shared_memory": kernel.shared_memory,
        "ctas": kernel.ctas,
        "threads": kernel.threads,
        "ctas_per_multiprocessor": kernel.ctas_per_multiprocessor,
        "instructions_per_element": instructions,
        "tma_loads": kernel.count("UTMALDG"),
        "fault": "; ".join(faults),
    }


def cases(
    shapes: Iterable[KernelShape], directions: Sequence[str], dtypes: Sequence[str], only: str = ""
) -> list[Case]:
    """All combinations, those alone whose text contains `only`."""
    scans = [(direction, operation) for direction in directions for operation in OPERATIONS]
    listed = (
        Case(shape, direction, pass_, operation, dtype)
        for shape in shapes
        for dtype in dtypes
        for direction, operation in (*scans, *([(ALL_DIRECTIONS, PROPAGATION)] if shape in LAYERS else []))
        for pass_ in PASSES
    )
    return [case for case in listed if only in str(case)]


def run(listed: Sequence[Case], out: str) -> list[Row]:
    """Compiles all cases, writes both tables into the folder `out` and returns the rows."""
    about = {
        "command": f"python -m experiments.kernel_report {shlex.join(sys.argv[1:])}",
        "commit": provenance.commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "compiled for": f"{deviceless.DEVICE_KIND}, with jax {jax.__version__} and ptxas "
        f"{deviceless.assembler_version()}",
        "bandwidth": f"{COPY_BANDWIDTH / 1e12} TB/s, about that of a copy on the card",
        "note": NOTE,
    }
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # before the minutes that compilation takes
    rows = []
    for number, case in enumerate(listed, 1):
        found = compile_rows(case)
        rows += found
        print(f"{number}/{len(listed)} {case}: {'; '.join(row['fault'] for row in found if row['fault']) or 'right'}")
    with open(folder / "kernel_report.csv", "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "kernel_report.md").write_text(_markdown(about, rows))
    return rows


def _markdown(about: dict[str, str], rows: Sequence[Row]) -> str:
    lines = ["# Kernels, compiled for an H200", "", *(f"- {key}: {about[key]}" for key in about), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(str(row[key]).replace("|", "\\|") for key in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    flags.DEFINE_string("only", "", 'Part of "SHAPE DIRECTION PASS OPERATION DTYPE": only rows that contain it.')
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
    listed = cases(SHAPES, chosen.direction, chosen.dtype, chosen.only)
    if not listed:
        raise ValueError(f"only: no row contains {chosen.only!r}")
    rows = run(listed, chosen.out)
    print(f"{len(rows)} rows written to {chosen.out}/kernel_report.md and .csv.")
    faulty = [row for row in rows if row["fault"]]
    if faulty:
        raise ValueError(f"{len(faulty)} of {len(rows)} rows have a fault, the first of {faulty[0]['shape']}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
