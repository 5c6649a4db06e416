import csv
import dataclasses

import pytest

from experiments import deviceless, kernel_limits, kernel_report, machine_code
from experiments.deviceless import Kernel
from experiments.kernel_limits import Moved
from experiments.kernel_report import COLUMNS, PASSES, Case, bind, cases, compile_rows, exists
from experiments.kernel_shapes import GROUPS, LAYERS, SHAPES, KernelShape
from experiments.propagation_bytes import chains, moved_by_kernels
from pallas_kernels.dispatch import PATHS
from pallas_kernels.mosaic.tiles import lines_of_product

compiles = pytest.mark.skipif(deviceless.missing() is not None, reason=str(deviceless.missing()))

TINY = KernelShape("tiny", 1, 5, 14, 64)
PADDED = KernelShape("padded", 2, 5, 14, 12, 1)
LAYER = KernelShape("layer", 1, 12, 10, 40, rank=8)
LOOP = {"FFMA": 100, "UTMASTG.4D": 6, "UTMACMDFLUSH": 2, "LDS.128": 2}
KERNEL = Kernel("a", (2, 1, 1), 128, 64, 0, 0, 50_000, {}, LOOP, {})
BY_NAME = {shape.name: shape for shape in SHAPES}


def all_directions(shape, operation, pass_="forward", dtype="bfloat16"):
    return Case(shape, "all", pass_, operation, dtype)


def test_cases_are_chosen_by_their_text():
    every = cases([TINY, PADDED], ["right", "down"], ["bfloat16"])
    assert len(every) == 2 * 2 * 2 * 2 and str(every[0]) == "tiny right forward from_logits bfloat16"
    assert len(cases([TINY, PADDED], ["right", "down"], ["bfloat16"], "padded down")) == 4


def test_layers_have_all_paths():
    stage = BY_NAME["gspn_t_stage4"]
    listed = [(case.operation, case.pass_) for case in cases([stage], [], ["bfloat16"])]
    assert listed == [
        (path, pass_) for path in PATHS for pass_ in PASSES if not (path.endswith("on_chip") and pass_ == "backward")
    ]
    assert {case.operation for case in cases([stage], [], ["float32"])} == {"fused", "fused_on_chip"}
    larger = cases(GROUPS["gspn_t_384"], ["right"], ["bfloat16"])
    assert {case.direction for case in larger} == {"all"} and {case.shape.height for case in larger} == {96, 48, 24, 12}
    assert not exists(all_directions(BY_NAME["sdxl_4k_level1"], "fused_on_chip"))


def test_small_layers_have_kernels_on_chip():
    small = [
        shape for shape in LAYERS if shape.height <= 32 and shape.name.startswith("gspn") and "nano" not in shape.name
    ]
    assert len(small) == 10 + 7 + 6
    assert all(exists(all_directions(shape, path)) for shape in small for path in PATHS)


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
    _, _, walks = bind(Case(TINY, "right", "forward", "from_logits", "bfloat16"))
    tile = walks[0].form.tile
    row = kernel_report._describe(Kernel(**{**vars(KERNEL), **changes}), walks, Moved(1000), 5 * 14 * 64)
    assert fault in row["fault"] and bool(fault) == bool(row["fault"])
    # 110 instructions for two lines.
    assert row["instructions_per_element"] == round(110 / 2 / (tile.rows * tile.channels / 128), 1)
    assert row["limited_by"] == "issue" and row["issue_us"] > row["floating_point_us"] > 0 == row["tensor_cores_us"]


def test_bytes_and_limits_by_hand():
    elements = 12 * 10 * 40
    moved = {(path, pass_): moved_by_kernels(LAYER, path, pass_, 2) for path in PATHS for pass_ in PASSES}
    arrays = {key: value.arrays / elements for key, value in moved.items()}
    assert arrays["fused", "forward"] == 82 and arrays["fused", "backward"] == 146
    assert arrays["low_rank", "forward"] == 34 and arrays["low_rank", "backward"] == 98
    assert arrays["fused_on_chip", "forward"] == 52 and arrays["low_rank_on_chip", "forward"] == 4
    assert all(arrays[path, "training forward"] == arrays[path, "forward"] + 8 for path in PATHS)
    assert moved["fused", "forward"].proxy == 0
    assert moved["low_rank_on_chip", "forward"].proxy == 2 * (2 * 12 * 10 * 16 + 24 * 16 * 40)

    sums = {(chain.path, chain.pass_): chain.total for chain in chains(BY_NAME["sdxl_4k_level1"])}
    assert sums["separate passes", "forward"] == pytest.approx(48 + 172 + 0.3, abs=0.1)
    assert sums["fused", "forward"] == pytest.approx(48 + 82 + 0.3, abs=0.1)
    assert sums["fused", "backward"] == pytest.approx(48 + 146 + 96 + 0.3, abs=0.1)
    assert sums["low_rank", "backward"] == pytest.approx(98 + 96 + 1, abs=0.1)
    # Weights of one channel: 3 logits of 4 directions less to write, to read twice, and 3 float32 weights to move.
    shared = {(chain.path, chain.pass_): chain.total for chain in chains(BY_NAME["gspn_t_stage1_shared"])}
    assert shared["separate passes", "forward"] == pytest.approx(24 + 4 * 6 + 28, abs=1.5)

    _, _, walks = bind(all_directions(LAYER, "fused"))
    mix = machine_code.Mix(128.0, 64.0, 4.0, 32.0, 0.0, 0.0)
    times = kernel_limits.microseconds(mix, walks, moved["fused", "forward"], elements)
    computed = sum(walk.elements for walk in walks)
    cycle = 1e6 / (132 * 1.7e9)
    assert times["issue"] == pytest.approx(computed * cycle) and times["floating_point"] == times["issue"] / 2
    assert times["special_functions"] == pytest.approx(computed / 4 * cycle)
    assert times["shared_memory"] == pytest.approx(computed * (32 + 82 / 4) / 128 * cycle)
    assert times["memory"] == pytest.approx(1e6 * 82 * elements / 4.3e12)
    # Lines of 12 and of 10 pixels, with 40 channels in blocks of a tile.
    tile = walks[0].form.tile
    assert computed == 2 * (12 + 10) * tile.extent * -(-40 // tile.channels) * tile.channels


def test_what_does_not_compile_is_a_row(monkeypatch):
    def refuse(case):
        raise ValueError("no tile\nfor it")

    monkeypatch.setattr(kernel_report, "bind", refuse)
    (row,) = compile_rows(Case(TINY, "right", "forward", "from_logits", "bfloat16"))
    assert row["fault"] == "ValueError: no tile for it" and row["registers"] == "" and list(row) == list(COLUMNS)
    assert row["bytes"] == 5 * 14 * 64 * 12 and row["bytes_per_element"] == 12


def test_rows_of_other_cases_stay(monkeypatch, tmp_path):
    def compile_rows(case):
        row = dict.fromkeys(COLUMNS, "")
        shape, *rest = case
        row.update(zip(("shape", "direction", "pass", "operation", "dtype"), (shape.name, *rest), strict=True))
        return [row | {"registers": len(made)}]

    made = []
    monkeypatch.setattr(kernel_report, "compile_rows", compile_rows)
    monkeypatch.setattr(kernel_report.deviceless, "assembler_version", lambda: "none")
    for commit, only in (("one", ""), ("two", "gspn_t_stage4 down forward"), ("three", "gspn_t_stage4 all backward")):
        made.append(commit)
        monkeypatch.setattr(kernel_report.provenance, "commit", lambda commit=commit: commit)
        kernel_report.run(cases([BY_NAME["gspn_t_stage4"]], ["right", "down"], ["bfloat16"], only), str(tmp_path))
    rows = kernel_report._read(tmp_path / "kernel_report.csv")
    assert len(rows) == 8 + 10 and len({kernel_report._key(row) for row in rows}) == 18
    found = [(row["commit"], row["registers"]) for row in rows]
    assert [found.count(pair) for pair in (("one", "1"), ("two", "2"), ("three", "3"))] == [14, 2, 2]
    assert [row["direction"] for row in rows] == ["right"] * 4 + ["down"] * 4 + ["all"] * 10


@compiles
@pytest.mark.parametrize("shape", [TINY, PADDED], ids=lambda shape: shape.name)
def test_report_of_one_shape(tmp_path, shape):
    rows = kernel_report.run(cases([shape], ["right"], ["bfloat16"]), str(tmp_path / "new"))
    assert [row["kernel"] for row in rows] == ["line_scan_forward", "line_scan_backward"] * 2
    for row in rows:
        assert row["fault"] == "" and row["ctas"] >= 1 <= row["ctas_per_multiprocessor"]
        assert row["tma_loads"] > 0 and 1 < row["instructions_per_element"] < 1000
        assert row["floating_point_per_element"] < row["instructions_per_element"]
        assert row[f"{row['limited_by']}_us"] == max(row[f"{unit}_us"] for unit in kernel_limits.UNITS)
    with open(tmp_path / "new/kernel_report.csv", newline="") as file:
        lines = list(file)
    about = [line for line in lines if line.startswith("# ")]
    assert any("Nothing here was executed" in line for line in about)
    assert any("ptxas 1" in line and "H200" in line for line in about)
    written = list(csv.DictReader(lines[len(about) :]))
    assert [row["registers"] for row in written] == [str(row["registers"]) for row in rows]
    table = (tmp_path / "new/kernel_report.md").read_text()
    assert "| low_rank_on_chip | forward | 0.0 | 4.8 | 0.0 | 4.8 |" in table
    assert sum(line.startswith(f"| {shape.name} |") for line in table.splitlines()) == 4


@compiles
def test_product_of_tensor_cores_counts_as_often_as_it_runs():
    function, arguments, walks = bind(all_directions(LAYER, "low_rank_on_chip"))
    (kernel,) = deviceless.compile_for_h200(function, *arguments).kernels
    tile = walks[0].form.tile
    assert lines_of_product(tile) > 1 and kernel.groups_of_loop >= 4  # a loop for each direction
    mix = kernel_limits.per_element(kernel, walks)
    assert mix is not None
    # Six maps of rank 16 for each element, and some for lines that there are not: 12 and 10 are no multiples.
    useful = 12 * 16
    products = sum(walk.products for walk in walks) / 4
    assert mix.tensor_flops == pytest.approx(
        useful * products * lines_of_product(tile) * 64 / (64 // tile.rows * tile.rows)
    )
    assert products >= 1 / lines_of_product(tile)
    with pytest.raises(LookupError, match="no branch around the product"):
        kernel_limits.per_element(dataclasses.replace(kernel, product_opcodes={}), walks)
