"""The kernels on an NVIDIA GPU of compute capability 9.0 or more, in the cases of the interpreter's tests."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from pallas_kernels.tolerances import card_tolerances
from tests import tolerances
from tests.pallas_kernels.mosaic import cases, propagation_cases


@pytest.fixture
def tolerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Judges by `card_tolerances`, whose arguments it takes; float32 products are whole, as these expect."""

    def use(*, made_maps: bool) -> None:
        for module in (tolerances, cases, propagation_cases):
            monkeypatch.setattr(module, "TOLERANCES", card_tolerances(made_maps=made_maps))

    with jax.default_matmul_precision("highest"):
        yield use


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.covering(), ids=str)
def test_covering_cases(case, tolerate):
    tolerate(made_maps=False)
    cases.check(case, "mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("case", propagation_cases.covering(), ids=str)
def test_covering_cases_of_propagation(case, planned, tolerate):
    """Results agree with the reference, in training and inference, and are bit-equal from run to run."""
    tolerate(made_maps=case.variant.startswith("low_rank"))
    planned(propagation_cases.TILES[case.tile])
    propagation_cases.check(case, "mosaic")
    propagation_cases.check_inference(case, "mosaic")
    one, other = (propagation_cases.y_and_gradients(case, "mosaic", *case.arrays()) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
