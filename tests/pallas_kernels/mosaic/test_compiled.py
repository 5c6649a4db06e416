"""The kernels compiled for an H200 on a machine without one: the compiler refuses shapes that the interpreter takes."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import line_scan, line_scan_from_logits
from pallas_kernels.mosaic import compile_only
from pallas_kernels.mosaic.card import H200
from pallas_kernels.mosaic.compile_only import compile_for_h200
from pallas_kernels.mosaic.operations import Kernels
from pallas_kernels.mosaic.tiles import Tile
from tests.pallas_kernels.mosaic import cases

pytestmark = pytest.mark.skipif(bool(compile_only.missing()), reason=str(compile_only.missing()))

# Stores to global memory by threads, and loads and stores of local memory (spilled registers).
BY_THREADS = ("STG", "LDL", "STL", "ATOM", "RED")


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
    assert [kernel.name for kernel in kernels] == ["line_scan_forward", "line_scan_backward"]
    for kernel in kernels:
        assert_sound(kernel)


def test_a_bulk_store_never_meets_a_ragged_line():
    """A contiguous box is stored by a bulk copy, which is not clipped and would overwrite the next line."""
    for length, is_bulk in ((16, True), (9, False)):
        x = jax.ShapeDtypeStruct((1, 4, length, 8), jnp.float32)
        logits = jax.ShapeDtypeStruct((1, 4, length, 3, 8), jnp.float32)
        scan = functools.partial(Kernels().scan_forward, direction="down", chunk=None, from_logits=True)
        (kernel,) = compile_for_h200(functools.partial(scan, tile=Tile(8, 16)), x, logits, x).kernels
        assert (kernel.count("UBLKCP") > 0) == is_bulk == (kernel.count("UTMASTG") == 0), (length, kernel.opcodes)


@pytest.mark.full
@pytest.mark.parametrize("direction,shape", [("down", (2, 1024, 1024, 1152)), ("right", (2, 1024, 1024, 1152)),
                                             ("down", (512, 1024, 1024, 8))])  # fmt: skip
def test_offsets_beyond_32_bits(direction, shape):
    """Maps of more than 2^31 elements: TMA takes coordinates, and a bulk copy's offset has 64 bits."""
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((*shape[:3], 3, shape[3]), jnp.bfloat16)
    scan = functools.partial(Kernels().scan_forward, direction=direction, chunk=None, from_logits=True)
    (kernel,) = compile_for_h200(scan, x, logits, x).kernels
    assert_sound(kernel)
    bulk = kernel.count("UBLKCP")
    assert (bulk > 0) == (shape[3] == 8)
    if bulk:
        wide = sum(n for opcode, n in kernel.opcodes.items() if re.match(r"U?IMAD\.WIDE", opcode))
        assert wide >= bulk, kernel.opcodes
