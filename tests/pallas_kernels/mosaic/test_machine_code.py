from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import UpProjection, propagate_low_rank
from pallas_kernels.mosaic import compile_only
from pallas_kernels.mosaic.card import H200
from pallas_kernels.mosaic.machine_code import parse
from pallas_kernels.mosaic.plans import forced, plan

# Two instructions, then twice over: two, a loop of three, one; then the end. The wait of the inner loop lies behind it.
SASS = """
.text.some_kernel:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28] ;
   -:-:-:Y:01        /*0010*/                   @UP1 UTMALDG.4D [UR24], [UR20] ;
.L_x_0:
   -:1:-:Y:01        /*0020*/                   LDS.128 R4, [R1+UR4] ;
   -:-:2:Y:02        /*0030*/               @P1 BRA `(.L_x_2) ;
.L_x_1:
   -:-:2:Y:02        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR22], R0 ;
 2&1:-:-:Y:05        /*0050*/              @!P0 BRA `(.L_x_3) ;
.L_x_4:
   -:2:-:Y:01        /*0060*/                   @UP1 UTMASTG.4D [UR24], [UR10] ;
   -:0:-:Y:01        /*0070*/                   UTMACMDFLUSH ;
   -:-:-:Y:05        /*0080*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
   -:-:-:Y:05        /*0090*/               @P3 BRA `(.L_x_0) ;
   -:-:-:Y:05        /*00a0*/                   EXIT ;
.L_x_3:
   -:1:2:Y:03        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R0 ;
   2:-:-:Y:05        /*00c0*/              @!P0 NANOSLEEP.SYNCS 0x989680 ;
   2:-:-:Y:05        /*00d0*/              @!P0 BRA `(.L_x_3) ;
   -:-:-:Y:05        /*00e0*/                   BRA `(.L_x_4) ;
.L_x_5:
   -:-:-:-:00        /*00f0*/                   BRA `(.L_x_5);
   -:-:-:-:00        /*0100*/                   NOP;
.L_x_6:
"""


def test_instructions():
    code = parse(SASS)
    assert len(code.instructions) == 17
    assert code.opcodes["LDS.128"] == 1 and code.opcodes["BRA"] == 7 and code.opcodes["UTMASTG.4D"] == 1
    store = code.instructions[6]
    assert (store.address, store.predicate, store.operands, store.scoreboard) == (0x60, "UP1", "[UR24], [UR10]", 2)
    assert str(store) == "UTMASTG.4D at 0x0060" and store.has("LDS", "UTMASTG") and not store.has("UTMAST")
    assert code.instructions[0].predicate == "" and code.instructions[0].scoreboard is None
    assert code.targets[8] == 4


def test_blocks_and_loops():
    code = parse(SASS)
    starts = [code.instructions[block.start].address for block in code.blocks]
    assert starts == [0x00, 0x20, 0x40, 0x60, 0x90, 0xA0, 0xB0, 0xE0, 0xF0, 0x100]
    assert {code.instructions[code.blocks[head].start].address for head in code.loops} == {0x20, 0x40}
    assert {code.instructions[n].address for n in code.innermost(6)} == {0x40, 0x50, 0x60, 0x70, 0x80} | set(
        range(0xB0, 0xF0, 16)
    )
    assert 9 in code.innermost(2) and code.innermost(0) == frozenset()
    assert not code.reached & {8, 9}


def test_executed_instructions():
    """Waits are short, and the inner loop is entered."""
    code = parse(SASS)
    assert code.executed((2, 10)) == {"prologue": 2, "loop 0x0020": 2 * 3, "loop 0x0040": 2 * 10 * 5, "epilogue": 1}
    with pytest.raises(ValueError, match=r"trips: expected 2, one for each loop, got 1"):
        code.executed((2,))


def test_what_cannot_be_read_is_refused():
    with pytest.raises(LookupError, match="no instruction"):
        parse(".text.some_kernel:")
    code = parse(SASS.replace("NOP", "RET.ABS R2"))
    assert code.opcodes["RET.ABS"] == 1
    with pytest.raises(LookupError, match="RET.ABS at 0x0100: expected no jump but to a label"):
        code.loops  # noqa: B018


@pytest.mark.full
@pytest.mark.skipif(bool(compile_only.missing()), reason=str(compile_only.missing()))
def test_the_prologue_is_small():
    """The first stage of GSPN-T: chunks of two lines, of which a CTA walks many. At most 15% of all instructions."""
    array: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    up = UpProjection(array(8, 4, 3, 96), array(8, 4, 96), array(8, 4, 96), array(8, 4, 96))
    problems = {}

    def run(*inputs):
        y, vjp = jax.vjp(lambda *inputs: propagate_low_rank(*inputs, chunk=2, implementation="mosaic"), *inputs)
        return y, *vjp(y)

    with forced(lambda problem, card: problems.setdefault(problem.kernel, problem) and None):
        maps = array(128, 56, 56, 96), array(128, 56, 56, 8)
        kernels = compile_only.compile_for_h200(run, *maps, up, array(4)).kernels
    assert [kernel.name for kernel in kernels] == ["low_rank_forward", "low_rank_backward"]
    for kernel, problem in zip(kernels, (problems["forward"], problems["backward"]), strict=True):
        tile = plan(problem, H200)
        assert tile is not None
        counts = kernel.code.executed((min(2 * tile.chunks, problem.lines),))
        assert 100 < counts["prologue"] < 0.15 * sum(counts.values()), (kernel.name, counts)
