import csv

import pytest

from experiments import deviceless, kernel_report
from experiments.deviceless import Kernel
from experiments.kernel_report import COLUMNS, Case, cases, compile_rows
from experiments.kernel_shapes import KernelShape
from pallas_kernels.mosaic.tiles import Tile

compiles = pytest.mark.skipif(deviceless.missing() is not None, reason=str(deviceless.missing()))

TINY = KernelShape("tiny", 1, 5, 14, 64)
PADDED = KernelShape("padded", 2, 5, 14, 12, 1)
KERNEL = Kernel("a", (2, 1, 1), 128, 64, 0, 0, 50_000, {}, {"FFMA": 100, "UTMASTG.4D": 6, "UTMACMDFLUSH": 2})


def test_cases_are_chosen_by_their_text():
    every = cases([TINY, PADDED], ["right", "down"], ["bfloat16"])
    assert len(every) == 2 * 2 * 2 * 2 and str(every[0]) == "tiny right forward from_logits bfloat16"
    assert len(cases([TINY, PADDED], ["right", "down"], ["bfloat16"], "padded down")) == 4


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
    row = kernel_report._describe(Kernel(**{**vars(KERNEL), **changes}), [Tile(channels=64, rows=16)])
    assert fault in row["fault"] and bool(fault) == bool(row["fault"])
    assert row["instructions_per_element"] == 6.8  # 108 instructions, two lines, 8 elements each


def test_what_does_not_compile_is_a_row(monkeypatch):
    def refuse(case):
        raise ValueError("no tile\nfor it")

    monkeypatch.setattr(kernel_report, "bind", refuse)
    (row,) = compile_rows(Case(TINY, "right", "forward", "from_logits", "bfloat16"))
    assert row["fault"] == "ValueError: no tile for it" and row["registers"] == "" and list(row) == list(COLUMNS)
    assert row["bytes"] == 5 * 14 * 64 * 12


@compiles
@pytest.mark.parametrize("shape", [TINY, PADDED], ids=lambda shape: shape.name)
def test_report_of_one_shape(tmp_path, shape):
    rows = kernel_report.run(cases([shape], ["right"], ["bfloat16"]), str(tmp_path / "new"))
    assert [row["kernel"] for row in rows] == ["line_scan_forward", "line_scan_backward"] * 2
    for row in rows:
        assert row["fault"] == "" and row["ctas"] >= 1 <= row["ctas_per_multiprocessor"]
        assert row["tma_loads"] > 0 and 1 < row["instructions_per_element"] < 1000
    with open(tmp_path / "new/kernel_report.csv", newline="") as file:
        lines = list(file)
    about = [line for line in lines if line.startswith("# ")]
    assert any("Nothing here was executed" in line for line in about)
    assert any("ptxas 1" in line and "H200" in line for line in about)
    written = list(csv.DictReader(lines[len(about) :]))
    assert [row["registers"] for row in written] == [str(row["registers"]) for row in rows]
    table = (tmp_path / "new/kernel_report.md").read_text()
    assert sum(line.startswith(f"| {shape.name} |") for line in table.splitlines()) == 4
