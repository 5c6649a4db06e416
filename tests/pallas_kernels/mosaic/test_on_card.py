"""The kernels on an NVIDIA card of compute capability 9.0 or more: what the interpreter cannot show."""

import pytest

from tests.pallas_kernels.mosaic import cases


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.covering(), ids=str)
def test_covering_cases(case):
    cases.check(case, "mosaic")
