"""Parameters of diffusion transformers under the names of facebookresearch/DiT, which SiT uses too."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gspn_jax.mixers import SoftmaxAttention
from gspn_jax.models.dit import DiT, positions
from gspn_jax.weights.torch_layouts import DENOISER_ENDS, Row, denoiser_sizes, filled, shape_of, unwrapped

_POSITIONS = "pos_embed"  # fixed, and made anew for every size of map
_BLOCK = [
    ("modulation", "adaLN_modulation.1"),
    ("mixer/qkv", "attn.qkv"),
    ("mixer/out", "attn.proj"),
    ("mlp/widen", "mlp.fc1"),
    ("mlp/narrow", "mlp.fc2"),
]


def facebook_dit(arrays: Mapping[str, Any], *, num_heads: int, dtype: jnp.dtype = jnp.float32) -> DiT:
    """Loads a DiT or SiT, or any network with its parameters' names. Shapes tell all sizes but the number of heads.

    Args:
        arrays: the authors' parameter names to arrays, or a checkpoint, as in `nvlabs_classifier`.
        num_heads: of the attention: 16 for XL and L, 12 for B, 6 for S.
        dtype: of the computation.

    Returns:
        the network; it takes latents (B, H, W, C), timestep (B,) and label (B,), with H and W of any size.

    Raises:
        ValueError: names the parameter that is missing, is left over, does not fit, or holds NaN or Inf; num_heads
            does not divide the width; the positions are not sines and cosines.
    """
    arrays = unwrapped(arrays)
    sizes = facebook_dit_sizes(arrays)
    _check_positions(arrays.pop(_POSITIONS, None), sizes["width"])

    def mixer(features: int, *, chunk: None, **options: Any) -> SoftmaxAttention:
        return SoftmaxAttention(features, num_heads=num_heads, use_bias=True, **options)

    build = functools.partial(DiT, **sizes, mixer=mixer, dtype=dtype)
    return filled(build, _rows(sizes["depth"]), arrays, kind="DiT")


def facebook_dit_sizes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Reads num_classes, width, depth, patch, in_channels and mlp_ratio off the arrays for `facebook_dit`.

    Raises:
        ValueError: names the parameter that is missing or misshapen.
    """
    arrays = unwrapped(arrays)
    sizes = denoiser_sizes(arrays, blocks="blocks")
    return sizes | dict(mlp_ratio=shape_of(arrays, "blocks.0.mlp.fc1.weight", axes=2)[0] / sizes["width"])


def _rows(depth: int) -> Iterator[Row]:
    for ours, theirs, layout in DENOISER_ENDS:
        yield tuple(ours.split("/")), theirs, layout
    for ours, theirs in _BLOCK:
        for leaf, suffix, layout in (("kernel", "weight", "linear"), ("bias", "bias", "vector")):
            names = [f"blocks.{index}.{theirs}.{suffix}" for index in range(depth)]
            yield ("blocks", *ours.split("/"), leaf), names, layout


def _check_positions(found: Any, width: int) -> None:
    if found is None:
        return
    found = np.asarray(found, np.float32)
    side = round(found[..., 0].size ** 0.5) if found.ndim else 0
    if found.shape != (1, side * side, width):
        raise ValueError(f"arrays: expected {_POSITIONS} of a square map, (1, N * N, {width}), got {found.shape}")
    if not np.allclose(found.reshape(side, side, width), positions(side, side, width), atol=1e-3):
        raise ValueError(f"arrays: expected sine-cosine positions in {_POSITIONS}, got others")
