"""Argument checks of the public operations. Each raises a ValueError "name: expected X, got Y".

Shapes may have symbolic sizes (`jax.export.symbolic_shape`), whose value is unknown while tracing: checks of a size
pass over them.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.directions import DIRECTIONS

_FLOATS = ("float32", "bfloat16", "float16", "float64")


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as a jax.Array."""
    try:
        return jnp.asarray(value)
    except TypeError:
        raise ValueError(f"{name}: expected an array, got {type(value).__name__}") from None


def check_float(name: str, array: jax.Array, dtypes: tuple[str, ...] = _FLOATS) -> None:
    """The dtype is one of `dtypes`."""
    if array.dtype.name not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(dtypes)}, got {array.dtype.name}")


def check_shape(name: str, array: jax.Array, expected: tuple[int, ...], meaning: str) -> None:
    """The shape is `expected`, which `meaning` explains in the message."""
    if array.shape != expected:
        raise ValueError(f"{name}: expected shape {expected} ({meaning}), got {array.shape}")


def has_empty_axis(shape: tuple[Any, ...]) -> bool:
    """Whether an axis has size 0; a symbolic size counts as at least 1."""
    return any(isinstance(size, int) and size < 1 for size in shape)


def check_map(name: str, array: jax.Array) -> None:
    """A (B, H, W, C) floating-point array without empty axes."""
    if array.ndim != 4 or has_empty_axis(array.shape):
        raise ValueError(f"{name}: expected shape (B, H, W, C), every axis at least 1, got {array.shape}")
    check_float(name, array)


def check_weight_channels(name: str, weight_channels: int, channels: int) -> None:
    """C_w divides C."""
    if weight_channels < 1 or channels % weight_channels:
        raise ValueError(f"{name}: expected C_w, its last axis, to divide C = {channels}, got {weight_channels}")


def check_weight_map(name: str, weights: jax.Array, x: jax.Array) -> None:
    """(B, H, W, 3, C_w) for an x of (B, H, W, C), where C_w divides C."""
    if weights.ndim != 5:
        raise ValueError(f"{name}: expected shape (B, H, W, 3, C_w), got {weights.shape}")
    check_shape(name, weights, (*x.shape[:3], 3, weights.shape[-1]), "(B, H, W, 3, C_w) with x's B, H, W")
    check_weight_channels(name, weights.shape[-1], x.shape[-1])


def check_direction(direction: str) -> None:
    """A name in `DIRECTIONS`."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}; got {direction!r}")


def check_chunk(chunk: int | None) -> int | None:
    """`chunk` as a plain int, or None."""
    if chunk is None:
        return None
    if isinstance(chunk, bool) or not isinstance(chunk, numbers.Integral) or chunk < 1:
        raise ValueError(f"chunk: expected None or a whole number of lines, at least 1; got {chunk!r}")
    return int(chunk)


def check_axis_name(name: str, axis: str | None) -> None:
    """A mesh axis's name, or None."""
    if axis is not None and not isinstance(axis, str):
        raise ValueError(f"{name}: expected the name of a mesh axis or None, got {axis!r}")


def state_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of the hidden state: float64 for float64 input, else float32."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
