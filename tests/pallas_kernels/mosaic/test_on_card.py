"""The kernels on an NVIDIA GPU of compute capability 9.0 or more, in the cases of the interpreter's tests."""

import numpy as np
import pytest

from tests.pallas_kernels.mosaic import cases, propagation_cases


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.covering(), ids=str)
def test_covering_cases(case):
    cases.check(case, "mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("case", propagation_cases.covering(), ids=str)
def test_covering_cases_of_propagation(case, planned):
    """Results agree with the reference, in training and inference, and are bit-equal from run to run."""
    planned(propagation_cases.TILES[case.tile])
    propagation_cases.check(case, "mosaic")
    propagation_cases.check_inference(case, "mosaic")
    one, other = (propagation_cases.y_and_gradients(case, "mosaic", *case.arrays()) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
