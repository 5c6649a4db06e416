import pytest

from experiments import step_parts
from experiments.hlo_costs import Array, Cost
from experiments.step_parts import KERNELS, MAPS, OTHER, SCANS

KERNEL = Cost("k", "mosaic_gpu_v2", 1, 0, 0, ("propagate", "Block._mix"), "", (Array((2, 3, 5, 4, 8), "bf16"),))


def test_parts_of_instructions():
    assert step_parts.part_of(KERNEL) == KERNELS
    fusion = {**vars(KERNEL), "kind": "fusion"}
    assert step_parts.part_of(Cost(**fusion)) == SCANS
    assert step_parts.part_of(Cost(**{**fusion, "kind": "matrix product"})) == MAPS
    assert step_parts.part_of(Cost(**{**fusion, "frames": ("_normalize", "LayerNorm.__call__")})) == "layer norm"
    assert step_parts.part_of(Cost(**{**fusion, "frames": ("main",)})) == OTHER


def test_a_kernel_takes_one_of_four_maps():
    assert step_parts.bytes_of(KERNEL) == 2 * 3 * 5 * 8 * 2
    assert step_parts.bytes_of(Cost(**{**vars(KERNEL), "operation": "propagation_on_chip/mpmd_map"})) == 8 * 240


def test_limit_is_the_longer_of_memory_and_arithmetic():
    product = Cost("p", "matrix product", 1, int(4.3e9), int(7e11), (), "", ())
    assert step_parts.limit(product) == pytest.approx(1e-3)
    assert step_parts.limit(Cost(**{**vars(product), "kind": "depthwise convolution"})) > 1e-2
