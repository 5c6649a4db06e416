"""Propagation: four line scans with gate, skip and merge, the body of the GSPN module."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import checks, dispatch, gradient
from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.line_scan import line_scan_from_logits
from pallas_kernels.sharding import usable_axes, vary_alike

ALIGNMENTS = ("aligned", "unturned")


def propagate(
    x: ArrayLike,
    logits: ArrayLike,
    lam: ArrayLike,
    gate: ArrayLike,
    skip: ArrayLike | None,
    merge: ArrayLike,
    *,
    chunk: int | None = None,
    alignment: str = "aligned",
    implementation: str | None = None,
    path: str | None = None,
    batch_axis: str | None = "data",
    channel_axis: str | None = "model",
) -> jax.Array:
    """Propagates a map in the four directions and merges the results (GSPN, section 3; `DIRECTIONS` gives the slots):

        y = sum_d  merge[d] * ( gate_d * line_scan_d(x; row_stochastic(logits_d), lam_d)  +  skip_d * x )

    The sums are float32 (float64 for float64 x). Between forward and backward the inputs and the four h, in x's dtype,
    are kept.

    Args:
      x: (B, H, W, C) float32, bfloat16, float16 or float64.
      logits: (B, H, W, 4, 3, C_w), C_w a divisor of C. Slots of the axis of 3 as in `line_scan`.
      lam, gate, skip: (B, H, W, 4, C); skip may be None.
      merge: (4,).
      chunk: lines after which each scan restarts; None never.
      alignment: "aligned": maps and results stay with their pixels. "unturned": what the code released in April 2025
        computes, on square maps only: x is turned so that each direction becomes "right" (transposed for down and up,
        then mirrored for left and up), the maps are not, and the results are not turned back.
      implementation, batch_axis, channel_axis: as in `line_scan`.
      path: of the Mosaic kernels, "fused" or "fused_on_chip"; None for the cheaper by the table of
        `pallas_kernels.mosaic.paths`.

    Returns:
      y, (B, H, W, C) in x's dtype.

    Raises:
      ValueError: wrong shapes, dtypes, chunk or names; "unturned" on a map that is not square; an implementation or
        path that cannot run here.
    """
    given = dict(x=x, logits=logits, lam=lam, gate=gate, merge=merge)
    x, logits, lam, gate, merge = (checks.as_array(name, array) for name, array in given.items())
    skip = None if skip is None else checks.as_array("skip", skip)
    _check_maps(x, logits, lam, gate, skip, merge)
    chunk = checks.check_chunk(chunk)
    checks.check_axis_name("batch_axis", batch_axis)
    checks.check_axis_name("channel_axis", channel_axis)
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment: expected one of {', '.join(ALIGNMENTS)}; got {alignment!r}")
    if alignment == "unturned":
        if x.shape[1] != x.shape[2]:
            raise ValueError(f"alignment: 'unturned' expects a square map, got x of shape {x.shape}")
        if path is not None:
            raise ValueError(f"path: expected None with alignment 'unturned', got {path!r}")
        options = dict(chunk=chunk, implementation=implementation, batch_axis=batch_axis, channel_axis=channel_axis)
        return _unturned(x, logits, lam, gate, skip, merge, **options)
    dtypes = {array.dtype.name for array in (x, logits, lam, gate, skip) if array is not None}
    weight_channels = logits.shape[-1]
    choice = dispatch.choose_propagation(
        "propagate", implementation, path, x, dtypes, chunk, weight_channels=weight_channels
    )
    call = gradient.Call(
        implementation=choice.implementation,
        chunk=chunk,
        axes=usable_axes(x.shape[0], x.shape[-1], weight_channels, batch_axis, channel_axis),
        paths=choice.paths,
    )
    return gradient.propagation(call, *vary_alike(x, logits, lam, gate, skip, merge))


def _check_maps(x, logits, lam, gate, skip, merge) -> None:
    checks.check_map("x", x)
    if logits.ndim != 6:
        raise ValueError(f"logits: expected shape (B, H, W, 4, 3, C_w), got {logits.shape}")
    expected = (*x.shape[:3], 4, 3, logits.shape[-1])
    checks.check_shape("logits", logits, expected, "(B, H, W, 4, 3, C_w) with x's B, H, W")
    checks.check_weight_channels("logits", logits.shape[-1], x.shape[-1])
    checks.check_float("logits", logits)
    for name, array in (("lam", lam), ("gate", gate), ("skip", skip)):
        if array is not None:
            checks.check_shape(name, array, (*x.shape[:3], 4, x.shape[-1]), "(B, H, W, 4, C) with x's B, H, W, C")
            checks.check_float(name, array)
    checks.check_shape("merge", merge, (4,), "one scalar a direction")
    checks.check_float("merge", merge)


def _unturned(x, logits, lam, gate, skip, merge, **options) -> jax.Array:
    dtype = checks.state_dtype(x)
    y = jnp.zeros_like(x, dtype)
    for d, direction in enumerate(DIRECTIONS):
        turned = jnp.swapaxes(x, 1, 2) if direction in ("down", "up") else x
        turned = turned[:, :, ::-1] if direction in ("left", "up") else turned
        h = line_scan_from_logits(turned, logits[:, :, :, d], lam[:, :, :, d], direction="right", **options)
        part = gate[:, :, :, d].astype(dtype) * h.astype(dtype)
        if skip is not None:
            part = part + skip[:, :, :, d].astype(dtype) * turned.astype(dtype)
        y = y + merge[d].astype(dtype) * part
    return y.astype(x.dtype)
