"""The kernels compiled for an H200 on a machine without one: the compiler refuses shapes that the interpreter takes."""

import collections
import functools
import re
from collections.abc import Callable

import jax
import pytest

from pallas_kernels import DIRECTIONS, line_scan, line_scan_from_logits
from pallas_kernels.mosaic import compile_only
from pallas_kernels.mosaic.card import H200
from pallas_kernels.mosaic.compile_only import compile_for_h200
from pallas_kernels.mosaic.operations import Kernels
from pallas_kernels.mosaic.tiles import Tile
from tests.pallas_kernels.mosaic import cases

pytestmark = pytest.mark.skipif(bool(compile_only.missing()), reason=str(compile_only.missing()))

# Stores to global memory by threads, and loads and stores of local memory (spilled registers).
BY_THREADS = ("STG", "LDL", "STL", "ATOM", "RED")


def scan_arrays(shape: tuple[int, ...], directions: int = 1, dtype: str = "bfloat16") -> list[jax.ShapeDtypeStruct]:
    """x, logits and lam of `Kernels.scan_forward`."""
    sizes = shape, (*shape[:3], directions, 3, shape[3]), (*shape[:3], directions, shape[3])
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def scan(directions: tuple[str, ...], chunk: int | None = None, tile: Tile | None = None) -> Callable:
    options = dict(directions=directions, chunk=chunk, from_logits=True, tile=tile)
    return functools.partial(Kernels().scan_forward, **options)


def cut_tile(case: cases.ScanCase) -> str | None:
    """The tile whose kernels have the most parts."""
    return case.tile if case.tile == "cut" else None


def assert_sound(kernel: compile_only.Kernel) -> None:
    assert kernel.spill_bytes == kernel.stack_bytes == 0, kernel
    assert kernel.shared_memory <= H200.shared_memory and kernel.ctas_per_multiprocessor >= 1, kernel
    assert kernel.count("UTMALDG") >= 3, kernel.opcodes  # x, lam, weights
    assert kernel.count("UTMASTG") + kernel.count("UBLKCP") >= 1, kernel.opcodes
    assert not sum(kernel.count(opcode) for opcode in BY_THREADS), kernel.opcodes


@pytest.mark.parametrize("case", cases.marked(cases.compiled(), quick=cut_tile))
def test_interpreted_cases_compile(case):
    operation = line_scan if case.source == "weights" else line_scan_from_logits
    scan = functools.partial(
        operation, direction=case.direction, chunk=case.chunk_lines, implementation="mosaic", tile=case.explicit_tile
    )

    def run(x, weights, lam, grad):
        h, vjp = jax.vjp(scan, x, weights, lam)
        return h, *vjp(grad)

    kernels = compile_for_h200(run, *cases.draw(case)).kernels
    assert [kernel.name for kernel in kernels] == ["scan_forward", "scan_backward"]
    for kernel in kernels:
        assert_sound(kernel)


def test_a_bulk_store_never_meets_a_ragged_line():
    """A contiguous box is stored by a bulk copy, which is not clipped and would overwrite the next line."""
    for length, is_bulk in ((16, True), (9, False)):
        arrays = scan_arrays((1, 4, length, 8), dtype="float32")
        (kernel,) = compile_for_h200(scan(("down",), tile=Tile(8, 16)), *arrays).kernels
        assert (kernel.count("UBLKCP") > 0) == is_bulk == (kernel.count("UTMASTG") == 0), (length, kernel.opcodes)


@pytest.mark.full
@pytest.mark.parametrize("direction,shape", [("down", (2, 1024, 1024, 1152)), ("right", (2, 1024, 1024, 1152)),
                                             ("down", (512, 1024, 1024, 8))])  # fmt: skip
def test_offsets_beyond_32_bits(direction, shape):
    """Maps of more than 2^31 elements: TMA takes coordinates, and a bulk copy's offset has 64 bits."""
    (kernel,) = compile_for_h200(scan((direction,)), *scan_arrays(shape)).kernels
    assert_sound(kernel)
    bulk = kernel.count("UBLKCP")
    assert (bulk > 0) == (shape[3] == 8)
    if bulk:
        wide = sum(n for opcode, n in kernel.opcodes.items() if re.match(r"U?IMAD\.WIDE", opcode))
        assert wide >= bulk, kernel.opcodes


@pytest.mark.parametrize("height,width,launches", [(12, 12, 1), (12, 20, 2)])
def test_a_launch_walks_all_directions_of_a_square_map(height, width, launches):
    compilation = compile_for_h200(scan(DIRECTIONS), *scan_arrays((1, height, width, 8), 4))
    assert compile_only.kernel_counts(compilation.compiled) == {"scan_forward": launches}


def test_a_grid_of_more_than_65535_ctas():
    """CUDA's second and third grid axes end there."""
    compilation = compile_for_h200(scan(DIRECTIONS, 2, Tile(8, 64)), *scan_arrays((2400, 56, 56, 8), 4))
    (kernel,) = compilation.kernels
    assert kernel.ctas >= 2400 * 28 * 4
    assert max(kernel.grid[1:]) <= 65535


def test_launches_that_hand_their_state_on_need_no_other_kernel():
    """Neither a copy of the state nor a counter for each launch: two scalars for each round of the loop."""
    compilation = compile_for_h200(scan(("down",), tile=Tile(8, 64, ghost=16)), *scan_arrays((1, 1024, 1024, 8)))
    bodies = re.findall(r"^%.*?^}", compilation.compiled.as_text() or "", re.MULTILINE | re.DOTALL)
    (loop,) = (body for body in bodies if "mosaic_gpu_v2" in body)
    launched = collections.Counter(re.findall(r"^  (?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([a-z-]+)\(", loop, re.MULTILINE))
    assert launched["custom-call"] >= 4, launched
    others = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "custom-call"}
    assert launched.keys() - others <= {"fusion"} and launched["fusion"] <= 2, launched
    for name in re.findall(r" fusion\(.*?calls=(%\S+?)[,\s]", loop):
        (called,) = (body for body in bodies if body.startswith(f"{name} "))
        assert re.search(r"\) -> s32\[\] {$", called.split("\n")[0]), called
