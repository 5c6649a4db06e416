import dataclasses
import itertools

import pytest

from experiments import tables
from experiments.benchmarks.shapes import GROUPS, LAYERS, SHAPES, KernelShape
from experiments.compiled import kernels, report
from experiments.compiled.kernels import COLUMNS, PASSES, REPORT, Program, exists, programs
from pallas_kernels.choices import VARIANTS
from pallas_kernels.mosaic import compile_only
from pallas_kernels.mosaic.compile_only import Kernel
from pallas_kernels.mosaic.machine_code import parse

compiles = pytest.mark.skipif(compile_only.missing() is not None, reason=str(compile_only.missing()))

TINY = KernelShape("tiny", 1, 5, 14, 64)
PADDED = KernelShape("padded", 2, 5, 14, 12, 1)
CODE = parse("\n".join(f"   -:-:-:Y:04    /*{16 * n:04x}*/    UTMALDG.4D [UR8], [UR4] ;" for n in range(3)))
KERNEL = Kernel("a", (2, 1, 1), 128, 64, 0, 0, 50_000, CODE)
BY_NAME = {shape.name: shape for shape in SHAPES}


def all_directions(shape, operation, pass_="forward", dtype="bfloat16"):
    return Program(shape, "all", pass_, operation, dtype)


def test_layers_have_all_variants():
    stage = BY_NAME["gspn_t_stage4"]
    listed = [(program.operation, program.pass_) for program in programs([stage], [], ["bfloat16"])]
    missing = {("scans", "training forward"), ("low_rank_on_chip", "backward")}
    assert listed == [pair for pair in itertools.product(VARIANTS, PASSES) if pair not in missing]
    assert {program.operation for program in programs([stage], [], ["float32"])} == {"scans"}
    larger = programs(GROUPS["gspn_t_384"], ["right"], ["bfloat16"])
    assert {program.direction for program in larger} == {"all"}
    assert {program.shape.height for program in larger} == {96, 48, 24, 12}
    assert not exists(all_directions(BY_NAME["sdxl_4k_level1"], "low_rank_on_chip"))
    scans = programs([TINY, PADDED], ["right", "down"], ["bfloat16"])
    assert len(scans) == 2 * 2 * 2 * 2 and str(scans[0]) == "tiny right forward from_logits bfloat16"


def test_layers_that_differ_in_rank_share_the_kernels_that_read_maps():
    pair = [BY_NAME["unet_8_c1280"], BY_NAME["unet_8_c1280_qkv"]]
    listed = [(program.shape, program.operation) for program in programs(pair, [], ["bfloat16"])]
    assert {operation for shape, operation in listed if shape == pair[0]} == set(VARIANTS)
    assert {operation for shape, operation in listed if shape == pair[1]} == {"low_rank", "low_rank_on_chip"}


def test_small_layers_have_kernels_on_chip():
    small = [
        shape for shape in LAYERS if shape.height <= 32 and shape.name.startswith("gspn") and "nano" not in shape.name
    ]
    assert len(small) == 10 + 7 + 6
    assert all(exists(all_directions(shape, variant)) for shape in small for variant in VARIANTS)


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({}, ""),
        ({"spill_bytes": 16}, "spills 16 bytes"),
        ({"shared_memory": 232449}, "more than 232448 bytes of shared memory"),
        ({"threads": 512, "registers": 255}, "more registers"),
    ],
)
def test_faults_of_a_kernel(changes, fault):
    row = kernels.resources(dataclasses.replace(KERNEL, **changes), stores=2)
    assert fault in row["fault"] and bool(fault) == bool(row["fault"])
    assert (row["kernel"], row["ctas"], row["tma_loads"]) == ("a", 2, 3)


def test_a_program_that_does_not_compile_is_a_row(monkeypatch):
    def refuse(program):
        raise ValueError("no tile\nfor it")

    monkeypatch.setattr(kernels, "bind", refuse)
    (row,) = kernels.compile_rows(Program(TINY, "right", "forward", "from_logits", "bfloat16"))
    assert row["fault"] == "ValueError: no tile for it" and row["registers"] == "" and list(row) == list(COLUMNS)
    with pytest.raises(ValueError, match="1 of 1 rows have a fault, the first: tiny"):
        report.refuse_faults([row], lambda row: row["shape"])


def test_rows_of_other_programs_stay(monkeypatch, tmp_path):
    def compile_rows(program):
        row = dict.fromkeys(COLUMNS, "")
        shape, *rest = program
        row.update(zip(("shape", "direction", "pass", "operation", "dtype"), (shape.name, *rest), strict=True))
        return [row | {"registers": len(made)}]

    made = []
    monkeypatch.setattr(compile_only, "missing", lambda: None)
    monkeypatch.setattr(compile_only, "assembler_version", lambda: "none")
    listed = programs([BY_NAME["gspn_t_stage4"]], ["right", "down"], ["bfloat16"])
    for commit, only in (("one", ""), ("two", "gspn_t_stage4 down forward"), ("three", "gspn_t_stage4 all backward")):
        made.append(commit)
        monkeypatch.setattr(report.provenance, "commit", lambda commit=commit: commit)
        some = [program for program in listed if only in str(program)]
        REPORT._replace(compile_rows=compile_rows).run(some, str(tmp_path / "kernel_report"))
    about, rows = tables.read(tmp_path / "kernel_report.csv")
    assert about["commit"] == "three" and "H200" in about["compiled for"]
    assert len(rows) == 8 + 7 and len({REPORT._key(row) for row in rows}) == 15
    found = [(row["commit"], row["registers"]) for row in rows]
    assert [found.count(pair) for pair in (("one", "1"), ("two", "2"), ("three", "3"))] == [11, 2, 2]
    assert [row["direction"] for row in rows] == ["right"] * 4 + ["down"] * 4 + ["all"] * 7


def test_an_interrupted_report_keeps_its_rows(monkeypatch, tmp_path):
    def compile_rows(program):
        if program == listed[1]:
            raise KeyboardInterrupt
        return [dict.fromkeys(COLUMNS, "") | {"shape": "tiny", "operation": "from_logits", "pass": "forward"}]

    monkeypatch.setattr(compile_only, "missing", lambda: None)
    monkeypatch.setattr(compile_only, "assembler_version", lambda: "none")
    listed = programs([TINY], ["right"], ["bfloat16"])
    with pytest.raises(KeyboardInterrupt):
        REPORT._replace(compile_rows=compile_rows).run(listed, str(tmp_path / "kernel_report"))
    assert len(tables.read(tmp_path / "kernel_report.csv")[1]) == 1


@pytest.mark.full
@compiles
@pytest.mark.parametrize("shape", [TINY, PADDED], ids=lambda shape: getattr(shape, "name", None))
def test_report_of_one_shape(tmp_path, shape):
    rows = REPORT.run(programs([shape], ["right"], ["bfloat16"]), str(tmp_path / "new/kernel_report"))
    assert [row["kernel"] for row in rows] == ["scan_forward", "scan_backward"] * 2
    for row in rows:
        assert row["fault"] == "" and row["ctas"] >= 1 <= row["ctas_per_multiprocessor"] and row["tma_loads"] > 0
    about, written = tables.read(tmp_path / "new/kernel_report.csv")
    assert about["note"].startswith("Compiled, not executed") and "ptxas 1" in about["compiled for"]
    assert [row["registers"] for row in written] == [str(row["registers"]) for row in rows]
    page = (tmp_path / "new/kernel_report.md").read_text()
    registers = rows[0]["registers"]
    assert f"| from_logits | forward | 1 | {registers} to {registers} | 0 to 0 |" in page and len(page.split("\n")) < 40
