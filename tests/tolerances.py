"""The measure that every comparison uses, with the tolerances of `pallas_kernels.tolerances`."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels.tolerances import TOLERANCES


def rms_ratio(got: ArrayLike, want: ArrayLike) -> float:
    """RMS(got - want) / RMS(want), in float64; 0 if both are zero everywhere, inf if only `want` is.

    Raises ValueError for shapes that differ (nothing is broadcast), for empty arrays and for values not finite.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise ValueError(f"shapes differ: got {got.shape}, want {want.shape}")
    if want.size == 0:
        raise ValueError(f"nothing to compare in arrays of shape {want.shape}")
    got, want = got.astype(np.float64), want.astype(np.float64)
    for name, array in (("got", got), ("want", want)):
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            where = tuple(int(i) for i in bad[0])
            raise ValueError(
                f"{name} has {len(bad)} values that are not finite, the first is {array[where]} at {where}"
            )
    # Scaled by the largest value, so that no square overflows or vanishes.
    scale = max(np.abs(want).max(), np.abs(got).max())
    if scale == 0:
        return 0.0
    size = np.sqrt(np.mean((want / scale) ** 2))
    error = np.sqrt(np.mean((got / scale - want / scale) ** 2))
    return float(error / size) if size > 0 else float("inf")


def assert_close(
    got: ArrayLike,
    want: ArrayLike,
    *,
    dtype: DTypeLike | None = None,
    tolerance: float | None = None,
    name: str = "result",
) -> None:
    """Asserts that `got` has the dtype, the shape and, by RMS ratio, the values of `want`.

    Args:
        got: the array under test.
        want: the reference, of the same shape; it may be of higher precision if `dtype` says what `got` must be.
        dtype: what `got` must be; default, the dtype of `want`.
        tolerance: the largest RMS ratio that passes; default, the table's for `dtype`.
        name: what the message calls it.
    """
    expected = jnp.dtype(dtype if dtype is not None else np.asarray(want).dtype)
    actual = np.asarray(got).dtype
    assert actual == expected, f"{name}: dtype is {actual}, expected {expected}"
    if tolerance is None:
        assert expected.name in TOLERANCES, f"{name}: no tolerance for {expected}, give one of {sorted(TOLERANCES)}"
        tolerance = TOLERANCES[expected.name]
    try:
        ratio = rms_ratio(got, want)
    except ValueError as error:
        raise AssertionError(f"{name}: {error}") from None
    if ratio > tolerance:
        got64, want64 = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
        worst = tuple(int(i) for i in np.unravel_index(np.argmax(np.abs(got64 - want64)), want64.shape))
        raise AssertionError(
            f"{name}: RMS ratio {ratio:.3g} is above {tolerance:.3g} ({expected}, shape {want64.shape}); "
            f"worst at {worst}: got {got64[worst]!r}, want {want64[worst]!r}"
        )
