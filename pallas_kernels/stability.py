"""The stability-context condition (GSPN, theorems 1 and 2): logits to row-stochastic tridiagonal weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels import checks
from pallas_kernels.directions import neighbour_axis

# Smaller logits count as this one: its sigmoid is 2e-12, so that the sum of three is never 0.
LOGIT_FLOOR = -27.0


def row_stochastic(logits: ArrayLike, *, direction: str) -> jax.Array:
    """Weights of a line scan: sigmoids of three logits, divided by their sum over the neighbours that exist.

    At the border the missing neighbour gets exactly 0 and the others still sum to 1, also on an axis of one pixel. A
    logit below -27 counts as -27. The result never has a 16-bit dtype: three times 1/3 is 1.002 in bfloat16, and a
    state that is multiplied by it on each of a thousand lines grows sevenfold. Differentiable in forward and reverse
    mode.

    Args:
        logits: (B, H, W, 3, C_w), any float dtype. The slots are the neighbours of smaller, same and larger index
            along the axis that the scan does not walk.
        direction: "right", "down", "left" or "up".

    Returns:
        (B, H, W, 3, C_w) float32 (float64 for float64 logits), at least 0; the three slots sum to 1.

    Raises:
        ValueError: wrong rank, slot count, dtype or direction.
    """
    logits = checks.as_array("logits", logits)
    if logits.ndim != 5 or logits.shape[3] != 3 or checks.has_empty_axis(logits.shape):
        raise ValueError(f"logits: expected shape (B, H, W, 3, C_w), every axis at least 1, got {logits.shape}")
    checks.check_float("logits", logits)
    checks.check_direction(direction)
    logits = logits.astype(checks.state_dtype(logits))
    return jnp.stack(normalise(neighbour_axis(direction), *jnp.unstack(logits, axis=3)), axis=3)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalise(axis: int, *logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights of the neighbours of smaller, same and larger index from their logits, one array each.

    Args:
        axis: along which the neighbours lie.
        logits: three float32 or float64 arrays of the same shape.
    """
    smaller, same, larger = _shares(axis, *logits)
    total = smaller + same + larger
    # Two weights are rounded to a grid on which sums are exact, and the same pixel gets the rest. So a row sums to 1
    # without error, however the compiler fuses: a relative error of 1e-7 on every line would grow to 5e-4 after 4,096.
    grid = 1 / jnp.finfo(total.dtype).epsneg
    smaller = jnp.round(smaller / total * grid) / grid
    larger = jnp.minimum(jnp.round(larger / total * grid) / grid, 1 - smaller)
    return smaller, 1 - (smaller + larger), larger


@normalise.defjvp
def _normalise_jvp(axis, logits, tangents):
    weights: Any = normalise(axis, *logits)
    # d log(share) / d logit = 1 - sigmoid, and 0 where the logit counts as the floor.
    relative = [
        jnp.where(logit < LOGIT_FLOOR, 0, jax.nn.sigmoid(-logit)) * tangent
        for logit, tangent in zip(logits, tangents, strict=True)
    ]
    mean = sum(weight * change for weight, change in zip(weights, relative, strict=True))
    return weights, tuple(weight * (change - mean) for weight, change in zip(weights, relative, strict=True))


def _shares(axis: int, *logits: jax.Array) -> list[jax.Array]:
    """Sigmoids of the logits, 0 where the neighbour lies outside the image."""
    length = logits[0].shape[axis]
    shares = []
    for logit, outside in zip(logits, (0, None, length - 1), strict=True):
        floor = jnp.asarray(LOGIT_FLOOR, logit.dtype)
        share = jax.nn.sigmoid(jnp.where(logit < floor, floor, logit))
        if outside is not None:
            share = jnp.where(lax.broadcasted_iota(jnp.int32, logit.shape, axis) == outside, 0, share)
        shares.append(share)
    return shares
