"""Gate, skip and merge: how the scans of the four directions become the result of a propagation."""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import state_dtype


def merged(x: jax.Array, h: jax.Array, gate: jax.Array, skip: jax.Array | None, merge: jax.Array) -> jax.Array:
    """y of `propagate`, (B, H, W, C) in x's dtype.

    Args:
        x: (B, H, W, C).
        h: of the four directions, (B, 4, H, W, C).
        gate: (B, H, W, 4, C).
        skip: (B, H, W, 4, C), or None for none.
        merge: (4,).
    """
    dtype = state_dtype(x)
    part = gate.astype(dtype) * jnp.moveaxis(h, 1, 3).astype(dtype)  # (B, H, W, 4, C)
    if skip is not None:
        part += skip.astype(dtype) * x[:, :, :, None].astype(dtype)
    return jnp.sum(merge.astype(dtype).reshape(1, 1, 1, 4, 1) * part, axis=3).astype(x.dtype)
