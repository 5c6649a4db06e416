"""The line scan, GSPN's recurrence in one direction, from weights or from the logits of row-stochastic weights."""

from typing import Any

import jax
from jax.typing import ArrayLike

from pallas_kernels import checks, dispatch, gradient
from pallas_kernels.choices import record
from pallas_kernels.mosaic.tiles import Tile
from pallas_kernels.sharding import usable_axes, vary_alike


def line_scan(
    x: ArrayLike,
    weights: ArrayLike,
    lam: ArrayLike,
    *,
    direction: str,
    chunk: int | None = None,
    implementation: str | None = None,
    tile: Tile | None = None,
    batch_axis: str | None = "data",
    channel_axis: str | None = "model",
) -> jax.Array:
    """Scans a map line by line: each line is a tridiagonal mix of the line before plus the gated input (GSPN, eq. 1).

    For direction "down", with h = 0 outside the image and before the first line:

        h[b, i, j, c] = sum_{k in -1, 0, +1} weights[b, i, j, 1 + k, c'] * h[b, i - 1, j + k, c]
                        + lam[b, i, j, c] * x[b, i, j, c],            c' = c // (C / C_w)

    "up" walks the rows from the last to the first; "right" and "left" walk the columns. The three neighbours lie along
    the axis that is not walked, the one of smaller index first. The state is float32 for any input dtype (float64 for
    float64 x).

    Differentiable in x, weights and lam, in reverse mode only: the gradient is a scan in the opposite direction, which
    keeps the inputs and h. Forward mode is not supported: `jax.jvp` and `jax.jacfwd` raise a TypeError, and so may
    `jax.hessian`, which uses it. With "xla", `jax.jacrev(jax.jacrev(f))` gives second derivatives.

    Args:
        x: (B, H, W, C) float32, bfloat16, float16 or float64; H and W may be 1.
        weights: (B, H, W, 3, C_w), where C_w divides C; float32, or float64 where x is. `row_stochastic` gives rows
            that sum to 1; other values are taken as they are. 16-bit weights are refused: their rows do not sum to 1.
        lam: (B, H, W, C), any of the four dtypes.
        direction: "right", "down", "left" or "up".
        chunk: the state restarts every `chunk` lines, counted from the line where the direction starts; None for a
            scan that never restarts.
        implementation: a name in `implementations()`, or None for the fastest that can run.
        tile: how a Mosaic kernel tiles the map (`pallas_kernels.mosaic.tiles`), forward and backward; None for the
            fastest tile, as measured or estimated. It changes results by rounding only.
        batch_axis: the mesh axis (of `jax.set_mesh`) that splits B; each device scans its own images. It is left out
            if the mesh lacks it, if it is already manual, or if it does not divide B.
        channel_axis: likewise for C.

    Returns:
        h, (B, H, W, C) in x's dtype.

    Raises:
        ValueError: wrong shapes, dtypes, direction, chunk or axis names, or an implementation that cannot run here.
    """
    x, weights, lam = (checks.as_array(*named) for named in (("x", x), ("weights", weights), ("lam", lam)))
    checks.check_map("x", x)
    checks.check_weight_map("weights", weights, x)
    checks.check_float("weights", weights, (checks.state_dtype(x).name,))
    return _scan(x, weights, lam, direction, chunk, implementation, tile, batch_axis, channel_axis, from_logits=False)


def line_scan_from_logits(
    x: ArrayLike,
    logits: ArrayLike,
    lam: ArrayLike,
    *,
    direction: str,
    chunk: int | None = None,
    implementation: str | None = None,
    tile: Tile | None = None,
    batch_axis: str | None = "data",
    channel_axis: str | None = "model",
) -> jax.Array:
    """`line_scan(x, row_stochastic(logits), lam)` whose weights are never in memory: each line computes its own.

    Differentiable in x, logits and lam, in reverse mode only, as `line_scan`.

    Args:
        x: as in `line_scan`.
        logits: (B, H, W, 3, C_w), where C_w divides C; float32, bfloat16, float16 or float64. Slots as in `line_scan`.
        lam: as in `line_scan`.
        direction: as in `line_scan`.
        chunk: as in `line_scan`.
        implementation: as in `line_scan`.
        tile: as in `line_scan`.
        batch_axis: as in `line_scan`.
        channel_axis: as in `line_scan`.

    Returns:
        h, (B, H, W, C) in x's dtype.

    Raises:
        ValueError: wrong shapes, dtypes, direction, chunk or axis names, or an implementation that cannot run here.
    """
    x, logits, lam = (checks.as_array(*named) for named in (("x", x), ("logits", logits), ("lam", lam)))
    checks.check_map("x", x)
    checks.check_weight_map("logits", logits, x)
    checks.check_float("logits", logits)
    return _scan(x, logits, lam, direction, chunk, implementation, tile, batch_axis, channel_axis, from_logits=True)


def _scan(
    x, weights, lam, direction, chunk, implementation, tile, batch_axis, channel_axis, from_logits: bool
) -> jax.Array:
    checks.check_shape("lam", lam, x.shape, "that of x")
    checks.check_float("lam", lam)
    checks.check_direction(direction)
    chunk = checks.check_chunk(chunk)
    checks.check_axis_name("batch_axis", batch_axis)
    checks.check_axis_name("channel_axis", channel_axis)
    if tile is not None and not isinstance(tile, Tile):
        raise ValueError(f"tile: expected None or a Tile of pallas_kernels.mosaic.tiles, got {tile!r}")
    operation = "line_scan_from_logits" if from_logits else "line_scan"
    dtypes = {array.dtype.name for array in (x, weights, lam)}
    call = gradient.Call(
        implementation=record(dispatch.choose(operation, implementation, x.shape, chunk, dtypes)).implementation,
        chunk=chunk,
        axes=usable_axes(x.shape[0], x.shape[-1], weights.shape[-1], batch_axis, channel_axis),
        directions=(direction,),
        from_logits=from_logits,
        tile=tile,
    )
    if tile is not None and call.implementation == "xla":
        raise ValueError("tile: expected None where `xla` runs, which has no tiles")
    h: Any = gradient.scan(call, *vary_alike(x, weights[:, :, :, None], lam[:, :, :, None]))  # of one direction
    return h[:, 0]
