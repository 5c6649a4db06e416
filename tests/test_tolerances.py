import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tolerances import card_tolerances
from tests.tolerances import TOLERANCES, assert_close, rms_ratio


def test_suite_runs_with_eight_cpu_devices_and_strict_promotion():
    assert len(jax.devices("cpu")) == 8
    with pytest.raises(Exception, match="promotion"):
        jnp.add(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32))
    with pytest.raises(ValueError, match="rank"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))


def test_rms_ratio_is_the_ratio_of_root_mean_squares():
    assert rms_ratio(np.array([3.0, 4.4]), np.array([3.0, 4.0])) == pytest.approx(0.4 / 5.0)
    assert rms_ratio(np.array([1e300, 1.1e300]), np.array([1e300, 1e300])) == pytest.approx(0.1 / np.sqrt(2))
    assert rms_ratio(np.array([1e-200, 2e-200]), np.array([1e-200, 1e-200])) == pytest.approx(np.sqrt(0.5))


def test_zero_reference():
    assert rms_ratio(np.zeros(3), np.zeros(3)) == 0.0
    assert rms_ratio(np.array([0.0, 1e-30]), np.zeros(2)) == float("inf")


def test_a_card_gets_more_only_in_float32():
    given, made = (card_tolerances(made_maps=made) for made in (False, True))
    assert {dtype for dtype in TOLERANCES if given[dtype] != TOLERANCES[dtype]} == {"float32"}
    assert TOLERANCES["float32"] < given["float32"] < made.pop("float32") and made.items() < given.items()


@pytest.mark.parametrize("dtype", sorted(TOLERANCES.keys() - {"float64"}))
def test_one_rounding_passes_and_a_wrong_element_fails(dtype):
    want = np.random.default_rng(0).normal(size=(16, 16))
    got = jnp.asarray(want, dtype)
    assert_close(got, want, dtype=dtype)
    with pytest.raises(AssertionError, match=r"weights: RMS ratio .* worst at \(3, 5\)"):
        assert_close(got.at[3, 5].add(1), want, dtype=dtype, name="weights")


@pytest.mark.parametrize(
    "got, want, message",
    [
        (np.ones(3), np.ones((3, 1)), r"shapes differ: got \(3,\), want \(3, 1\)"),
        (np.ones(1), np.ones(3), "shapes differ"),
        (np.ones(3, np.float32), np.ones(3), "dtype is float32, expected float64"),
        (np.array([1.0, np.nan]), np.ones(2), r"got has 1 values that are not finite, the first is nan at \(1,\)"),
        (np.array([np.inf]), np.array([np.inf]), "not finite"),
        (np.ones(2), np.array([1.0, np.nan]), "want has 1 values"),
        (np.ones((0, 3)), np.ones((0, 3)), "nothing to compare"),
        (np.ones(2, np.int32), np.ones(2, np.int32), "no tolerance for int32"),
    ],
)
def test_what_cannot_be_compared_is_refused(got, want, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(got, want)


def test_tolerance_is_an_upper_bound():
    want = np.ones(4)
    assert_close(want + 1e-3, want, tolerance=1.01e-3)
    with pytest.raises(AssertionError, match="is above"):
        assert_close(want + 1e-3, want, tolerance=0.99e-3)
