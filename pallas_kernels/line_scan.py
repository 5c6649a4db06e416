"""The line scan: GSPN's recurrence in one direction."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import checks, dispatch, gradient
from pallas_kernels.sharding import usable_axes, vary_alike


def line_scan(
    x: ArrayLike,
    weights: ArrayLike,
    lam: ArrayLike,
    *,
    direction: str,
    chunk: int | None = None,
    implementation: str | None = None,
    batch_axis: str | None = "data",
    channel_axis: str | None = "model",
) -> jax.Array:
    """Scans the lines of a map: each is a tridiagonal mix of the one before plus the gated input (GSPN, equation 1).

    For direction "down", with h = 0 outside the image and before the first line:

        h[b, i, j, c] = sum_{k in -1, 0, +1} weights[b, i, j, 1 + k, c'] * h[b, i - 1, j + k, c]
                        + lam[b, i, j, c] * x[b, i, j, c],            c' = c // (C / C_w)

    "up" walks the rows from the last to the first, "right" and "left" walk the columns; the neighbours always lie on
    the axis that is not walked, the one of smaller index first. The state is float32 whatever comes in (float64 for
    float64 x). Any H, W >= 1; differentiable in x, weights and lam by a scan walked backwards, which keeps the inputs
    and h.

    Args:
      x: (B, H, W, C) float32, bfloat16, float16 or float64.
      weights: (B, H, W, 3, C_w), C_w a divisor of C; float32, or float64 where x is. Rows that sum to 1 come from
        `row_stochastic`; any others are taken as they are. 16-bit weights are refused: their rows do not sum to 1.
      lam: (B, H, W, C), any of the four dtypes.
      direction: "right", "down", "left" or "up".
      chunk: the state restarts every `chunk` lines, counted from the line where the direction starts; None never.
      implementation: a name of `implementations()`, or None for the fastest that can run.
      batch_axis, channel_axis: mesh axes (of `jax.set_mesh`) that split B and C; each device scans its own part. An
        axis that the mesh lacks, that is already manual, or that does not divide is left out.

    Returns:
      h, (B, H, W, C) in x's dtype.

    Raises:
      ValueError: wrong shapes, dtypes, direction, chunk, axis names, or an implementation that cannot run here.
    """
    x, weights, lam = jnp.asarray(x), jnp.asarray(weights), jnp.asarray(lam)
    checks.check_map("x", x)
    if weights.ndim != 5:
        raise ValueError(f"weights: expected shape (B, H, W, 3, C_w), got {weights.shape}")
    checks.check_shape("weights", weights, (*x.shape[:3], 3, weights.shape[-1]), "(B, H, W, 3, C_w) with x's B, H, W")
    checks.check_weight_channels("weights", weights.shape[-1], x.shape[-1])
    checks.check_float("weights", weights, (checks.state_dtype(x).name,))
    checks.check_shape("lam", lam, x.shape, "that of x")
    checks.check_float("lam", lam)
    checks.check_direction(direction)
    chunk = checks.check_chunk(chunk)
    checks.check_axis_name("batch_axis", batch_axis)
    checks.check_axis_name("channel_axis", channel_axis)
    call = gradient.Call(
        implementation=dispatch.choose("line_scan", implementation, x.shape, chunk),
        chunk=chunk,
        axes=usable_axes(x.shape[0], x.shape[-1], weights.shape[-1], batch_axis, channel_axis),
        direction=direction,
    )
    return gradient.scan(call, *vary_alike(x, weights, lam))
