"""The compiled kernels keep the order that the memory model asks for, and kernels that do not are caught."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import UpProjection, line_scan_from_logits, propagate_low_rank
from pallas_kernels.mosaic import compile_only, primitives
from pallas_kernels.mosaic.compile_only import Kernel, compile_for_h200
from pallas_kernels.mosaic.machine_code import STORES, MachineCode
from pallas_kernels.mosaic.order import violations
from pallas_kernels.mosaic.plans import forced
from pallas_kernels.mosaic.tiles import Tile

pytestmark = pytest.mark.skipif(bool(compile_only.missing()), reason=str(compile_only.missing()))

Array: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)


def scan(shape: tuple[int, ...], tile: Tile, chunk: int | None = None) -> tuple[Kernel, ...]:
    """The kernels of a scan from logits and of its gradient."""
    operation = functools.partial(
        line_scan_from_logits, direction="down", chunk=chunk, implementation="mosaic", tile=tile
    )
    return _compiled(operation, Array(shape), Array((*shape[:3], 3, shape[3])), Array(shape))


def low_rank(
    shape: tuple[int, ...], tile: Tile, chunk: int | None = None, variant: str = "low_rank"
) -> tuple[Kernel, ...]:
    """The kernels of a propagation from a proxy of 8 channels, and of its gradient."""
    up = UpProjection(Array((8, 4, 3, shape[3])), *[Array((8, 4, shape[3]))] * 3)
    operation = functools.partial(propagate_low_rank, chunk=chunk, implementation="mosaic", variant=variant)
    taken = set()

    def choose(problem, card):
        if not problem.fits(tile, card):
            return None
        taken.add(problem.kernel)
        return tile

    with forced(choose):
        kernels = _compiled(operation, Array(shape), Array((*shape[:3], 8)), up, Array((4,)))
    assert taken == {"forward", "backward"}
    return kernels


def _compiled(operation: Callable, *inputs) -> tuple[Kernel, ...]:
    def run(*inputs):
        result, vjp = jax.vjp(operation, *inputs)
        return result, vjp(result)

    return compile_for_h200(run, *inputs).kernels


# Each compiles a forward and a backward kernel.
FAMILIES = {
    "scan": lambda: scan((2, 16, 16, 16), Tile(16, 16, 1, 3, 2)),
    "chunks": lambda: scan((2, 16, 16, 16), Tile(16, 16, 1, 3, 2, chunks=4), chunk=4),
    "warpgroups": lambda: scan((2, 16, 40, 16), Tile(8, 16, 3, 3, 2)),
    "ghost": lambda: scan((2, 20, 70, 8), Tile(8, 48, 1, 2, 2, ghost=8)),
    "in turn": lambda: low_rank((2, 16, 16, 32), Tile(8, 16, 2, 3, 2, overlap=False)),
    "overlapping": lambda: low_rank((2, 64, 64, 16), Tile(8, 64, 1, 3, 2, chunks=2), chunk=32),
    "low rank ghost": lambda: low_rank((1, 17, 70, 16), Tile(8, 64, 1, 3, 2, ghost=16)),
    "on chip": lambda: low_rank((2, 16, 16, 16), Tile(8, 16, 1, 3, 2), variant="low_rank_on_chip"),
}
compiled = functools.cache(lambda name: FAMILIES[name]())  # by several tests
BOTH = [pytest.param(name, marks=() if name == "scan" else pytest.mark.full) for name in FAMILIES]


@pytest.mark.parametrize("name", BOTH)
def test_kernels_keep_the_order(name):
    kernels = compiled(name)
    assert len(kernels) >= 2
    for kernel in kernels:
        assert violations(kernel.code, stores=2) == [], kernel.name
        # With one buffer less, results would be written before they have been read.
        assert any("have been read" in text for text in violations(kernel.code, stores=1)), kernel.name


class Places:
    """Where the operations of the order are in a kernel: those around the first copy of results."""

    def __init__(self, code: MachineCode):
        self.code = code
        self.copy = self.next(0, *STORES)
        self.fence = self.last(self.copy, "FENCE.VIEW.ASYNC.S")
        self.write = self.last(self.fence, "STS", "STSM")
        self.barrier = self.next(self.fence, "BAR.SYNC")
        self.flush = self.next(self.copy, "UTMACMDFLUSH")
        self.wait = self.last(self.write, "DEPBAR.LE")
        self.wait_barrier = self.next(self.wait, "BAR.SYNC")
        self.end = self.next(0, "EXIT")
        self.last_wait = self.last(self.end, "DEPBAR.LE")

    def next(self, start: int, *opcodes: str) -> int:
        """The first of the opcodes from instruction `start` on."""
        return next(n for n in range(start, len(self.code.instructions)) if self.code.instructions[n].has(*opcodes))

    def last(self, end: int, *opcodes: str) -> int:
        """The last of the opcodes before instruction `end`."""
        return next(n for n in reversed(range(end)) if self.code.instructions[n].has(*opcodes))

    def changed(self, n: int, **fields: str) -> MachineCode:
        instructions = list(self.code.instructions)
        instructions[n] = dataclasses.replace(instructions[n], **fields)
        return dataclasses.replace(self.code, instructions=tuple(instructions))

    def without(self, n: int) -> MachineCode:
        return self.changed(n, opcode="NOP", operands="")

    def swapped(self, n: int, m: int) -> MachineCode:
        instructions = list(self.code.instructions)
        instructions[n], instructions[m] = instructions[m], instructions[n]
        return dataclasses.replace(self.code, instructions=tuple(instructions))


# What is changed in the machine code, and what is then found.
PLANTED: dict[str, tuple[Callable[[Places], MachineCode], str]] = {
    "no fence": (lambda at: at.without(at.fence), "no fence since the last write"),
    "a fence in some threads": (lambda at: at.changed(at.fence, predicate="P0"), "no fence since the last write"),
    "no barrier": (lambda at: at.without(at.barrier), "no barrier since the last write"),
    "barrier before fence": (lambda at: at.swapped(at.fence, at.barrier), "no barrier since the last write"),
    "write after fence": (lambda at: at.swapped(at.write, at.fence), "writes between the fence and the barrier"),
    "write after barrier": (lambda at: at.swapped(at.write, at.barrier), "no fence since the last write"),
    "copy before fence": (lambda at: at.swapped(at.copy, at.fence), "no fence since the last write"),
    "no wait": (lambda at: at.without(at.wait), "writes before the copies before have been read"),
    "short wait": (lambda at: at.changed(at.wait, operands="SB0, 0x2"), "writes before the copies before"),
    "a wait for loads": (lambda at: at.changed(at.wait, operands="SB3, 0x1"), "writes before the copies"),
    "a wait of one thread": (lambda at: at.without(at.wait_barrier), "writes before a barrier follows the wait"),
    "open group": (lambda at: at.without(at.flush), "is in no group"),
    "group before copy": (lambda at: at.swapped(at.copy, at.flush), "is in no group"),
    "end before copies": (lambda at: at.without(at.last_wait), "EXIT at .*: copies may not have been read"),
    "dependent launch": (lambda at: at.changed(0, opcode="ACQBULK"), "ACQBULK at 0x0000: launches depend"),
    "early launch": (lambda at: at.changed(at.flush, opcode="PREEXIT"), "PREEXIT at .*: launches depend"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_planted_violations_are_caught(name):
    for kernel in compiled(name):
        at = Places(kernel.code)
        for what, (plant, message) in PLANTED.items():
            found = violations(plant(at), stores=2)
            assert re.search(message, "\n".join(found)), (what, kernel.name, found)


@pytest.mark.full
@pytest.mark.parametrize("name", ["in turn", "overlapping", "on chip"])
def test_a_product_that_is_not_awaited_is_caught(name):
    code = compiled(name)[0].code
    waits = [n for n, one in enumerate(code.instructions) if one.has("WARPGROUP.DEPBAR")]
    assert waits
    instructions = list(code.instructions)
    for n in waits:
        instructions[n] = dataclasses.replace(instructions[n], opcode="NOP", operands="")
    found = violations(dataclasses.replace(code, instructions=tuple(instructions)), stores=2)
    assert any("touches the result of HGMMA" in text for text in found), found


def _late_commit():
    primitives_commit()
    primitives_end_group()


primitives_commit, primitives_end_group = primitives.commit, primitives.end_group
# What operations of `primitives` become, and what is then found in the compiled code.
LOST: dict[str, tuple[dict[str, Callable[..., None]], str]] = {
    "commit": ({"commit": lambda: None}, "no fence since the last write"),
    "commit after copies": ({"commit": lambda: None, "end_group": _late_commit}, "no fence since the last write"),
    "end_group": ({"end_group": lambda: None}, "is in no group"),
    "wait_stored": ({"wait_stored": lambda groups: None}, "writes before the copies before have been read"),
    "wait_written": ({"wait_written": lambda: None}, "copies may not have been read"),
}


@pytest.mark.parametrize("lost", [pytest.param(key, marks=pytest.mark.full if key != "commit" else ()) for key in LOST])
def test_kernels_that_lost_an_operation_are_caught(lost, monkeypatch):
    replacements, message = LOST[lost]
    for operation, replacement in replacements.items():
        monkeypatch.setattr(primitives, operation, replacement)
    for kernel in FAMILIES["scan"]():
        found = violations(kernel.code, stores=2)
        assert any(message in text for text in found), (kernel.name, found)
