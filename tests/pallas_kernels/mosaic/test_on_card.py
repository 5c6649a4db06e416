"""The kernels on an NVIDIA card of compute capability 9.0 or more: what the interpreter cannot show."""

import jax
import numpy as np
import pytest

from tests.pallas_kernels.mosaic import cases, test_propagation
from tests.tolerances import assert_close


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.covering(), ids=str)
def test_covering_cases(case):
    cases.check(case, "mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("case", test_propagation.CASES, ids=lambda case: "x".join(map(str, case.shape)))
def test_propagation_twice(case):
    """The reference's results, and the same bits again."""
    run = jax.jit(test_propagation.run, static_argnums=(0, 1))
    got, again, want = (run(case, name, *case.arrays()) for name in ("mosaic", "mosaic", "xla"))
    for name, one, other, reference in zip(test_propagation.NAMES, got, again, want, strict=True):
        if reference is not None:
            np.testing.assert_array_equal(one, other, err_msg=name)
            assert_close(one, reference, name=name)
