"""Propagation, the body of the GSPN module: four line scans with gate, skip and merge."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import checks, dispatch, gradient
from pallas_kernels.choices import VARIANTS, Choice, Variants, record
from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.line_scan import line_scan_from_logits
from pallas_kernels.merging import merged
from pallas_kernels.sharding import usable_axes, vary_alike
from pallas_kernels.up_projection import UpProjection, maps_of

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
    variant: str | None = None,
    batch_axis: str | None = "data",
    channel_axis: str | None = "model",
) -> jax.Array:
    """Propagates a map in four directions and merges the results (GSPN, section 3):

        y = sum_d  merge[d] * ( gate_d * line_scan_d(x; row_stochastic(logits_d), lam_d)  +  skip_d * x )

    `DIRECTIONS` gives the order of the four directions. The sums are float32 (float64 for float64 x).

    Differentiable in all arrays, in reverse mode only; between forward and backward it keeps the inputs and h of the
    four directions, in x's dtype. Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) is not supported, as in
    `line_scan`.

    Args:
        x: (B, H, W, C) float32, bfloat16, float16 or float64.
        logits: (B, H, W, 4, 3, C_w), where C_w divides C. The axis of 3 has the slots of `line_scan`.
        lam: (B, H, W, 4, C).
        gate: (B, H, W, 4, C).
        skip: (B, H, W, 4, C), or None for none.
        merge: (4,).
        chunk: lines after which each scan restarts; None for scans that never restart.
        alignment: "aligned": maps and results stay at their pixels. "unturned": the formula of the code released in
            April 2025, for square maps only. It turns x so that each direction becomes "right" (transposed for down
            and up, then mirrored for left and up), but does not turn the maps, and does not turn the results back.
        implementation: as in `line_scan`.
        variant: of the Mosaic kernels: None or "scans", the only one for maps that are given.
        batch_axis: as in `line_scan`.
        channel_axis: as in `line_scan`.

    Returns:
        y, (B, H, W, C) in x's dtype.

    Raises:
        ValueError: wrong shapes, dtypes, chunk or names; "unturned" on a map that is not square; an implementation or
            variant that cannot run here.
    """
    given = dict(x=x, logits=logits, lam=lam, gate=gate, merge=merge)
    x, logits, lam, gate, merge = (checks.as_array(name, array) for name, array in given.items())
    skip = None if skip is None else checks.as_array("skip", skip)
    _check_maps(x, logits, lam, gate, skip)
    chunk = _check_rest(merge, chunk, batch_axis, channel_axis)
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment: expected one of {', '.join(ALIGNMENTS)}; got {alignment!r}")
    if alignment == "unturned":
        if x.shape[1] != x.shape[2]:
            raise ValueError(f"alignment: 'unturned' expects a square map, got x of shape {x.shape}")
        if variant is not None:
            raise ValueError(f"variant: expected None with alignment 'unturned', got {variant!r}")
        options = dict(chunk=chunk, implementation=implementation, batch_axis=batch_axis, channel_axis=channel_axis)
        return _unturned(x, logits, lam, gate, skip, merge, **options)
    dtypes = {array.dtype.name for array in (x, logits, lam, gate, skip) if array is not None}
    choice = dispatch.choose("propagate", implementation, x.shape, chunk, dtypes)
    _check_variant(variant, ("scans",), choice)
    if choice.implementation != "xla":
        choice = dataclasses.replace(choice, variants=Variants("scans", "scans", "scans"))
    call = gradient.Call(
        implementation=record(choice).implementation,
        chunk=chunk,
        axes=usable_axes(x.shape[0], x.shape[-1], logits.shape[-1], batch_axis, channel_axis),
        directions=DIRECTIONS,
        from_logits=True,
    )
    arrays: Any = vary_alike(x, logits, lam, gate, skip, merge)
    return merged(arrays[0], gradient.scan(call, *arrays[:3]), *arrays[3:])


def propagate_low_rank(
    x: ArrayLike,
    proxy: ArrayLike,
    up: UpProjection,
    merge: ArrayLike,
    *,
    chunk: int | None = None,
    implementation: str | None = None,
    variant: str | None = None,
    batch_axis: str | None = "data",
    channel_axis: str | None = "model",
) -> jax.Array:
    """Aligned `propagate(x, *maps, merge)` whose maps are linear functions of a proxy: maps_d = proxy @ up[:, d].

    The maps have the proxy's dtype; `xla` may keep those of gate and skip wider. They are made where they are needed,
    forward and backward: between the two only x, proxy, up and h of the four directions are kept. Only the Mosaic
    kernels with a 32-bit proxy take them as arrays, passed to `propagate`, which keeps them.

    Differentiable in x, proxy, up and merge, in reverse mode only, as `propagate`.

    Args:
        x: (B, H, W, C) float32, bfloat16, float16 or float64.
        proxy: (B, H, W, S), any of these dtypes.
        up: `UpProjection`; it is cast to the proxy's dtype.
        merge: (4,).
        chunk: as in `propagate`.
        implementation: as in `propagate`.
        variant: of the Mosaic kernels, a name in `VARIANTS`; None for the fastest, as measured or estimated.
        batch_axis: as in `propagate`.
        channel_axis: as in `propagate`.

    Returns:
        y, (B, H, W, C) in x's dtype.

    Raises:
        ValueError: wrong shapes, dtypes, chunk or names; an implementation or variant that cannot run here.
    """
    x, proxy, merge = (checks.as_array(*named) for named in (("x", x), ("proxy", proxy), ("merge", merge)))
    up = _checked_up(x, proxy, up)
    chunk = _check_rest(merge, chunk, batch_axis, channel_axis)
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant: expected None or one of {', '.join(VARIANTS)}; got {variant!r}")
    dtypes = {x.dtype.name, proxy.dtype.name}
    choice = dispatch.choose("propagate_low_rank", implementation, x.shape, chunk, dtypes)
    _check_variant(variant, VARIANTS, choice)
    weight_channels = up.logits.shape[-1]
    if choice.implementation != "xla":
        if proxy.dtype.itemsize > 2:
            if variant is not None and variant != "scans":
                raise ValueError(f"variant: {variant!r} expects a 16-bit proxy, got {proxy.dtype.name}")
            options: Any = dict(implementation=implementation, batch_axis=batch_axis, channel_axis=channel_axis)
            return propagate(x, *maps_of(proxy, up), merge, chunk=chunk, variant=variant, **options)
        choice = _with_variants(choice, variant, dtypes, weight_channels, rank=proxy.shape[-1])
    call = gradient.Call(
        implementation=record(choice).implementation,
        chunk=chunk,
        axes=usable_axes(x.shape[0], x.shape[-1], weight_channels, batch_axis, channel_axis),
        variants=choice.variants,
    )
    arrays: Any = vary_alike(x, proxy, merge, *up)
    x, proxy, merge, *projections = arrays
    return gradient.low_rank(call, x, proxy, UpProjection(*projections), merge)


def _with_variants(
    choice: Choice, variant: str | None, dtypes: Collection[str], weight_channels: int, rank: int
) -> Choice:
    """`choice` of Mosaic kernels for a low-rank propagation, with their variants.

    Raises:
        ValueError: `variant` cannot run.
    """
    from pallas_kernels.mosaic import variants  # late: importing Pallas takes a second

    widest = max(dtypes, key=lambda name: jnp.dtype(name).itemsize)  # a tile that fits it fits the others
    propagation = variants.Propagation(choice.shape, widest, weight_channels, choice.chunk, rank)
    chosen = variants.choose(propagation, variant, choice.implementation == "mosaic_interpret")
    why = "variant asked for" if variant else f"variants {variants.basis(propagation)}"
    return dataclasses.replace(choice, variants=chosen, reason="; ".join(filter(None, (choice.reason, why))))


def _check_variant(variant: str | None, known: tuple[str, ...], choice: Choice) -> None:
    """None, or one of the `known` variants where Mosaic kernels run."""
    if variant is None:
        return
    if variant not in known:
        raise ValueError(f"variant: expected None or one of {', '.join(known)}; got {variant!r}")
    if choice.implementation == "xla":
        raise ValueError(f"variant: expected None where `xla` runs, got {variant!r}")


def _check_rest(merge: jax.Array, chunk: int | None, batch_axis: str | None, channel_axis: str | None) -> int | None:
    """Checks the arguments that both operations have; `chunk` as a plain int."""
    checks.check_shape("merge", merge, (4,), "one scalar for each direction")
    checks.check_float("merge", merge)
    checks.check_axis_name("batch_axis", batch_axis)
    checks.check_axis_name("channel_axis", channel_axis)
    return checks.check_chunk(chunk)


def _check_maps(x, logits, lam, gate, skip) -> None:
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


def _checked_up(x: jax.Array, proxy: jax.Array, up: Any) -> UpProjection:
    """`up` as arrays in the proxy's dtype, after checks of x, proxy and up."""
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


def _unturned(x, logits, lam, gate, skip, merge, **options) -> jax.Array:
    dtype = checks.state_dtype(x)
    y = jnp.zeros_like(x, dtype)
    for d, direction in enumerate(DIRECTIONS):
        turned = jnp.swapaxes(x, 1, 2) if direction in ("down", "up") else x  # (B, W, H, C), square
        turned = turned[:, :, ::-1] if direction in ("left", "up") else turned
        h = line_scan_from_logits(turned, logits[:, :, :, d], lam[:, :, :, d], direction="right", **options)
        part = gate[:, :, :, d].astype(dtype) * h.astype(dtype)
        if skip is not None:
            part = part + skip[:, :, :, d].astype(dtype) * turned.astype(dtype)
        y = y + merge[d].astype(dtype) * part
    return y.astype(x.dtype)
