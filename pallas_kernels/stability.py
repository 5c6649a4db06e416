"""The stability-context condition (GSPN, theorems 1 and 2): logits to row-stochastic tridiagonal weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks
from pallas_kernels.directions import neighbour_axis

# Below this a logit counts as this: three sigmoids of at least 2e-12 have a sum that can be divided by.
LOGIT_FLOOR = -27.0


def row_stochastic(logits: jax.Array, *, direction: str) -> jax.Array:
    """Weights of a line scan: sigmoids of three logits, divided by their sum over the neighbours that exist.

    At the border the missing neighbour gets exactly 0 and the others still sum to 1, also on an axis of one pixel. A
    logit below -27 counts as -27. The result is never 16 bits wide: three times 1/3 is 1.002 in bfloat16, and a state
    multiplied by it over a thousand lines grows sevenfold.

    Args:
      logits: (B, H, W, 3, C_w), any float dtype. Slots: neighbour of smaller index, same index, larger index, along
        the axis that the scan does not walk.
      direction: "right", "down", "left" or "up".

    Returns:
      (B, H, W, 3, C_w) float32 (float64 for float64 logits): at least 0, each three sum to 1.

    Raises:
      ValueError: wrong rank, slot count, dtype or direction.
    """
    logits = jnp.asarray(logits)
    if logits.ndim != 5 or logits.shape[3] != 3 or min(logits.shape) < 1:
        raise ValueError(f"logits: expected shape (B, H, W, 3, C_w), every axis at least 1, got {logits.shape}")
    checks.check_float("logits", logits)
    checks.check_direction(direction)
    return _weights(direction, logits.astype(checks.state_dtype(logits)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weights(direction: str, logits: jax.Array) -> jax.Array:
    share = _shares(direction, logits)
    total = jnp.sum(share, axis=3, keepdims=True)
    # Two weights are rounded to a grid on which sums are exact and the same pixel takes what is left, so that a row
    # sums to 1 without error, whatever a compiler fuses: an error of one part in 10 million that repeats on every
    # line has grown to 5e-4 after 4,096 of them.
    grid = 1 / jnp.finfo(logits.dtype).epsneg
    smaller = jnp.round(share[..., 0:1, :] / total * grid) / grid
    larger = jnp.minimum(jnp.round(share[..., 2:3, :] / total * grid) / grid, 1 - smaller)
    return jnp.concatenate([smaller, 1 - (smaller + larger), larger], axis=3)


@_weights.defjvp
def _weights_jvp(direction, primals, tangents):
    (logits,), (tangent,) = primals, tangents
    weights = _weights(direction, logits)
    # d log(share) / d logit = 1 - sigmoid, and 0 where the logit counts as the floor.
    relative = jnp.where(logits < LOGIT_FLOOR, 0, jax.nn.sigmoid(-logits)) * tangent
    return weights, weights * (relative - jnp.sum(weights * relative, axis=3, keepdims=True))


def _shares(direction: str, logits: jax.Array) -> jax.Array:
    floor = jnp.asarray(LOGIT_FLOOR, logits.dtype)
    share = jax.nn.sigmoid(jnp.where(logits < floor, floor, logits))
    return share * _existing(logits.shape, direction).astype(logits.dtype)


def _existing(shape: tuple[int, ...], direction: str) -> np.ndarray:
    """1 where the neighbour of a slot lies inside the image, else 0; shape (1, H or 1, W or 1, 3, 1)."""
    axis = neighbour_axis(direction)
    length = shape[axis]
    inside = np.ones((length, 3))
    inside[0, 0] = 0
    inside[-1, 2] = 0
    return inside.reshape((1, length, 1, 3, 1) if axis == 1 else (1, 1, length, 3, 1))
