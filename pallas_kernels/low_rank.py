"""Propagation whose maps are made of a low-rank proxy, in kernels that never write them."""

from typing import Any

import jax
from jax.typing import ArrayLike

from pallas_kernels import checks, dispatch, gradient
from pallas_kernels.propagation import propagate
from pallas_kernels.sharding import usable_axes, vary_alike
from pallas_kernels.up_projection import UpProjection, maps_of


def propagate_low_rank(
    x: ArrayLike,
    proxy: ArrayLike,
    up: UpProjection,
    merge: ArrayLike,
    *,
    chunk: int | None = None,
    implementation: str | None = None,
    path: str | None = None,
    batch_axis: str | None = "data",
    channel_axis: str | None = "model",
) -> jax.Array:
    """The aligned `propagate(x, *maps, merge)` of maps that are linear in a proxy: maps_d = proxy @ up[:, d].

    The maps have the dtype of the proxy. With a 16-bit proxy on a card they are made where they are used, and again for
    the gradient: between forward and backward x, proxy, up and the four h are kept. With another dtype, or without
    kernels, it is the composition with `propagate`, whose inputs are kept.

    Args:
      x: (B, H, W, C) float32, bfloat16, float16 or float64.
      proxy: (B, H, W, S), any of these dtypes.
      up: `UpProjection`, taken in the proxy's dtype.
      merge, chunk, implementation, batch_axis, channel_axis: as in `propagate`.
      path: of the Mosaic kernels, a name of `pallas_kernels.dispatch.PATHS`; None for the cheapest by the table of
        `pallas_kernels.mosaic.paths`.

    Returns:
      y, (B, H, W, C) in x's dtype.

    Raises:
      ValueError: wrong shapes, dtypes, chunk or names; an implementation or path that cannot run here.
    """
    x, proxy, merge = (checks.as_array(*named) for named in (("x", x), ("proxy", proxy), ("merge", merge)))
    up = _checked(x, proxy, up)
    checks.check_shape("merge", merge, (4,), "one scalar a direction")
    checks.check_float("merge", merge)
    chunk = checks.check_chunk(chunk)
    checks.check_axis_name("batch_axis", batch_axis)
    checks.check_axis_name("channel_axis", channel_axis)
    if path is not None and path not in dispatch.PATHS:
        raise ValueError(f"path: expected None or one of {', '.join(dispatch.PATHS)}; got {path!r}")
    if proxy.dtype.itemsize > 2:
        if path is not None and path.startswith("low_rank"):
            raise ValueError(f"path: {path!r} expects a 16-bit proxy, got {proxy.dtype.name}")
        options: Any = dict(chunk=chunk, implementation=implementation, path=path)
        return propagate(x, *maps_of(proxy, up), merge, batch_axis=batch_axis, channel_axis=channel_axis, **options)
    choice = dispatch.choose_propagation(
        "propagate_low_rank", implementation, path, x, {x.dtype.name, proxy.dtype.name}, chunk,
        weight_channels=up.logits.shape[-1], rank=proxy.shape[-1],
    )  # fmt: skip
    if choice.paths is None:
        options = dict(chunk=chunk, implementation=implementation)
        return propagate(x, *maps_of(proxy, up), merge, batch_axis=batch_axis, channel_axis=channel_axis, **options)
    call = gradient.Call(
        implementation=choice.implementation,
        chunk=chunk,
        axes=usable_axes(x.shape[0], x.shape[-1], up.logits.shape[-1], batch_axis, channel_axis),
        paths=choice.paths,
    )
    arrays: Any = vary_alike(x, proxy, merge, *up)
    x, proxy, merge, *projections = arrays
    return gradient.low_rank(call, x, proxy, UpProjection(*projections), merge)


def _checked(x: jax.Array, proxy: jax.Array, up: Any) -> UpProjection:
    """`up` as arrays of the proxy's dtype."""
    checks.check_map("x", x)
    if proxy.ndim != 4 or proxy.shape[:3] != x.shape[:3] or proxy.shape[3] < 1:
        raise ValueError(f"proxy: expected shape (B, H, W, S) with x's B, H, W, got {proxy.shape} for x {x.shape}")
    checks.check_float("proxy", proxy)
    if not isinstance(up, UpProjection):
        raise ValueError(f"up: expected an UpProjection, got {type(up).__name__}")
    rank, channels = proxy.shape[-1], x.shape[-1]
    arrays = [None if a is None else checks.as_array(f"up.{name}", a) for name, a in zip(up._fields, up, strict=True)]
    for name, array in zip(up._fields, arrays, strict=True):
        if array is None:
            if name != "skip":
                raise ValueError(f"up.{name}: expected an array, got None")
            continue
        if name == "logits":
            if array.ndim != 4:
                raise ValueError(f"up.logits: expected shape (S, 4, 3, C_w), got {array.shape}")
            expected = (rank, 4, 3, array.shape[-1])
            checks.check_shape("up.logits", array, expected, "(S, 4, 3, C_w) with the proxy's S")
            checks.check_weight_channels("up.logits", array.shape[-1], channels)
        else:
            checks.check_shape(f"up.{name}", array, (rank, 4, channels), "(S, 4, C) with the proxy's S and x's C")
        checks.check_float(f"up.{name}", array)
    cast: Any = (None if array is None else array.astype(proxy.dtype) for array in arrays)
    return UpProjection(*cast)
