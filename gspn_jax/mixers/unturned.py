"""The turned maps of GSPN's released text-to-image program where a map is twice as wide as high."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import line_scan_from_logits
from pallas_kernels.checks import state_dtype


def wide_turns(x: jax.Array) -> list[jax.Array]:
    """The four maps (B, H, W, C) that the program scans to the right: x, its mirror image, "x transposed", its mirror.

    "x transposed" swaps channels and rows where a square map's swaps columns and rows: the memory of (C, H, W), with
    its first two axes swapped, is read as (C, H, W) again.
    """
    batch, height, width, channels = x.shape
    # (B, H, W, C) to (B, H, C, W), read as (B, C, H, W), to (B, H, W, C)
    swapped = x.swapaxes(2, 3).reshape(batch, channels, height, width).transpose(0, 2, 3, 1)
    return [x, x[:, :, ::-1], swapped, swapped[:, :, ::-1]]


def wide_logits(columns: jax.Array) -> jax.Array:
    """Columns of logits (S, 4, 3, C_w) with those of each direction and slot put where the program takes them from.

    On square maps it numbers its rows by (slot, direction), on wide ones by (pair of directions, slot, direction of the
    pair).
    """
    rank, channels = columns.shape[0], columns.shape[-1]
    numbered = columns.swapaxes(1, 2).reshape(rank, 2, 3, 2, channels)
    return numbered.transpose(0, 1, 3, 2, 4).reshape(columns.shape)


def propagate_turned(
    turns: Sequence[jax.Array],
    logits: jax.Array,
    lam: jax.Array,
    gate: jax.Array,
    skip: jax.Array,
    merge: jax.Array,
    **options: Any,
) -> jax.Array:
    """Scans four maps to the right and merges them, with maps and results as they are:

        y = sum_d  merge[d] * ( gate_d * line_scan_right(turns[d]; logits_d, lam_d)  +  skip_d * turns[d] )

    Args:
        turns: four maps (B, H, W, C).
        logits: (B, H, W, 4, 3, C_w).
        lam, gate, skip: (B, H, W, 4, C).
        merge: (4,).
        options: chunk and implementation of `pallas_kernels.line_scan_from_logits`.

    Returns:
        (B, H, W, C) in the dtype of the maps, summed in float32 (float64 for float64 maps).
    """
    dtype = state_dtype(turns[0])
    y = jnp.zeros_like(turns[0], dtype)
    for d, x in enumerate(turns):
        h = line_scan_from_logits(x, logits[:, :, :, d], lam[:, :, :, d], direction="right", **options)
        gated = gate[:, :, :, d].astype(dtype) * h.astype(dtype) + skip[:, :, :, d].astype(dtype) * x.astype(dtype)
        y += merge[d].astype(dtype) * gated
    return y.astype(turns[0].dtype)
