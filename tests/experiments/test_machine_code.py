import pytest

from experiments.machine_code import count_opcodes, mix

SASS = """
.text.some_kernel:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
   -:-:-:Y:01        /*0010*/                   @UP1 UTMALDG.4D [UR24], [UR20]
.L_x_0:
   -:-:-:Y:01        /*0020*/                   UBLKCP.S.G [UR8], [UR11], UR10
   -:-:-:Y:05        /*0030*/              @!P0 BRA `(.L_x_0)
.L_x_1:
   -:-:-:Y:01        /*0040*/                   LDS.128 R4, [R2]
.L_x_2:
   -:-:-:Y:01        /*0050*/                   FFMA R4, R5, R6, R7
   -:1:-:Y:01        /*0060*/                   @UP1 UTMASTG.4D [UR24], [UR8]
   -:-:-:Y:05        /*0070*/               @P1 BRA `(.L_x_3)
   -:-:-:Y:05        /*0080*/                   BRA `(.L_x_2)
   -:-:-:Y:05        /*0090*/               @P3 BRA `(.L_x_1)
.L_x_3:
   -:-:-:Y:05        /*00a0*/                   EXIT
.L_x_4:
   -:-:-:Y:05        /*00b0*/                   BRA `(.L_x_2)
"""

# Two directions, of which the last stores, and a product that runs where it is needed.
TWO_LOOPS = """
.L_x_0:
   -:-:-:Y:01        /*0000*/                   MUFU.EX2 R4, R4
   -:-:-:Y:01        /*0010*/                   UTMACMDFLUSH
   -:-:-:Y:05        /*0020*/               @P1 BRA `(.L_x_0)
.L_x_1:
   -:-:-:Y:05        /*0030*/                   @!P1 BRA P2, `(.L_x_4)
   -:-:-:Y:05        /*0040*/                   @!P1 BRA `(.L_x_9)
.L_x_2:
   -:-:-:Y:01        /*0050*/                   HGMMA.64x192x16.F32.BF16 R24, gdesc[UR4].tnspB, RZ, !UPT, gsb0
   -:-:-:Y:01        /*0060*/                   STSM.16.M88.4 [R15+0xe800], R24
   -:-:-:Y:05        /*0070*/                   @P1 BRA `(.L_x_3)
   -:-:-:Y:01        /*0080*/                   @UP1 UTMALDG.4D [UR16], [UR28]
.L_x_3:
   -:-:-:Y:01        /*0090*/                   HGMMA.64x192x16.F32.BF16 R24, gdesc[UR4].tnspB, R24, gsb0
.L_x_4:
   -:-:-:Y:01        /*00a0*/                   LDS.U16 R4, [R15]
   -:-:-:Y:01        /*00b0*/                   UTMASTG.4D [UR40], [UR8]
   -:-:-:Y:01        /*00c0*/                   UTMACMDFLUSH
   -:-:-:Y:05        /*00d0*/               @P1 BRA `(.L_x_1)
   -:-:-:Y:05        /*00e0*/                   EXIT
.L_x_9:
   -:-:-:Y:05        /*00f0*/                   BRA `(.L_x_2)
"""


def test_the_line_loop_is_the_innermost_that_stores():
    opcodes, loop, product = count_opcodes(SASS)
    assert sum(opcodes.values()) == 12 and opcodes["UTMALDG.4D"] == 1 and opcodes["BRA"] == 5
    assert loop == {"FFMA": 1, "UTMASTG.4D": 1, "BRA": 2} and product == {}
    assert count_opcodes(SASS.replace("UTMASTG.4D", "UTMALDG.4D")).loop == {}
    without_loop = SASS.replace("BRA `(.L_x_2)", "NOP", 1).replace("BRA `(.L_x_1)", "NOP")
    assert count_opcodes(without_loop).loop == {}  # the rare path behind EXIT remains
    with pytest.raises(LookupError, match="no instruction"):
        count_opcodes("")


def test_every_direction_has_a_line_loop_and_the_product_is_apart():
    _, loop, product = count_opcodes(TWO_LOOPS)
    assert sum(loop.values()) == 14 and loop["UTMACMDFLUSH"] == 2 and loop["MUFU.EX2"] == 1
    # From the branch that skips all of it: not the wait, whose branch leads out of the loop, nor the copy inside.
    assert product == {"BRA": 2, "HGMMA.64x192x16.F32.BF16": 2, "STSM.16.M88.4": 1, "UTMALDG.4D": 1}
    assert count_opcodes(TWO_LOOPS.replace("@!P1 BRA P2,", "BRA")).product == {}  # is never entered from above


def test_work_of_the_units_by_hand():
    _, loop, product = count_opcodes(TWO_LOOPS)
    every = mix(loop, product, 0.25)
    assert every.instructions == 14 - 0.75 * 6 and every.special_functions == 1 and every.floating_point == 0
    assert every.shared_memory == 0.25 * 16 + 4  # a 2-byte load takes as long as one of 4
    assert every.tensor_flops * 128 == 0.25 * 2 * (2 * 64 * 192 * 16)
    assert every.tensor_operands * 128 == 0.25 * 2 * (2 * (64 + 192) * 16)
    other = mix({"FADD.FTZ": 1, "FMNMX.NAN": 2, "HFMA2.BF16_V2": 3, "FSEL": 4, "LDS": 1, "LDS.64": 2}, {}, 1)
    assert other.floating_point == 6 and other.shared_memory == 4 + 2 * 8
