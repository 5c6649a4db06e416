"""Diffusion transformers (DiT, arXiv 2212.09748): the comparators of the generators, as a denoiser of latents.

Patches of the latents become tokens with sine-cosine positions; timestep and class steer every block by adaLN-zero:
they give shift, scale and gate of its two branches, and start at zero. SiT is the same network under another objective.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.mixers import MixerBuilder
from gspn_jax.models import layers
from gspn_jax.models.conditioning import AdaptiveHead, Conditioning, plain_norm
from gspn_jax.models.generator import XAVIER, check_inputs
from gspn_jax.models.sizes import check_counts, check_positive
from gspn_jax.models.stack import graph_of, stacked
from pallas_kernels import named_layer


class DiTBlock(nnx.Module):
    """Mixing and an MLP, each of a norm that the condition shifts and scales, each gated by it."""

    def __init__(self, width: int, *, mixer: MixerBuilder, mlp_ratio: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        zero = nnx.initializers.zeros
        self.dtype = dtype
        self.modulation = nnx.Linear(width, 6 * width, kernel_init=zero, rngs=rngs)
        self.norm = plain_norm(width, rngs=rngs)
        self.mixer = mixer(width, chunk=None, dtype=dtype, rngs=rngs)
        hidden = round(mlp_ratio * width)
        self.mlp = layers.MLP(width, hidden, kernel_init=XAVIER, approximate=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """x: (B, H, W, width) float32; condition: (B, width) float32."""
        parts = jnp.split(self.modulation(jax.nn.silu(condition))[:, None, None], 6, axis=-1)
        for branch, (shift, scale, gate) in ((self.mixer, parts[:3]), (self.mlp, parts[3:])):
            modulated = self.norm(x) * (1 + scale) + shift
            x += gate * branch(modulated.astype(self.dtype)).astype(jnp.float32)
        return x


class DiT(nnx.Module):
    """Noisy latents, timestep and class to noise and variance. Any map of whole patches, square or not."""

    def __init__(
        self,
        num_classes: int,
        width: int,
        depth: int,
        *,
        mixer: MixerBuilder,
        patch: int = 2,
        in_channels: int = 4,
        mlp_ratio: float = 4.0,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        num_classes: classes beside "no class".
        width: channels of the tokens, a multiple of 4.
        depth: blocks.
        mixer: called as mixer(width, chunk=None, dtype=..., rngs=...), gives a module on maps.
        patch: rows and columns of the latents that make one token.
        in_channels: of the latents.
        mlp_ratio: hidden channels of an MLP, relative to width.
        remat: computes each block again in the backward pass instead of keeping what is inside it.
        dtype: of the computation; parameters, residual stream, norms and the last layer are float32.
        """
        check_counts(num_classes=num_classes, width=width, depth=depth, patch=patch, in_channels=in_channels)
        check_positive(mlp_ratio=mlp_ratio)
        if width % 4:
            raise ValueError(f"width: expected a multiple of 4, sines and cosines of two positions; got {width}")
        dtype = jnp.dtype(dtype)
        self.patch, self.in_channels, self.num_classes = patch, in_channels, num_classes
        self.depth, self.remat, self.dtype = depth, remat, dtype
        block = functools.partial(DiTBlock, width, mixer=mixer, mlp_ratio=mlp_ratio, dtype=dtype)
        self.embed = nnx.Linear(patch * patch * in_channels, width, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.conditioning = Conditioning(num_classes, width, rngs=rngs)
        self.blocks = stacked(block, depth, rngs)
        self.block = graph_of(block)
        self.head = AdaptiveHead(width, patch * patch * 2 * in_channels, rngs=rngs)

    def __call__(
        self, latents: jax.Array, timestep: jax.Array, label: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Arguments, result and errors as of `Generator`; nothing is random, so that `key` is not used."""
        check_inputs(latents, timestep, label, self.num_classes, channels=self.in_channels, patch=self.patch)
        condition = self.conditioning(timestep, label)
        x = self.embed(layers.patches(latents, self.patch)).astype(jnp.float32)
        x += positions(*x.shape[1:])[None]

        def step(x: jax.Array, state: Any) -> tuple[jax.Array, None]:
            return nnx.merge(self.block, state)(x, condition), None

        # In a scan nothing can undo the recomputation, so that it needs no barriers against it.
        step = jax.checkpoint(step, prevent_cse=False) if self.remat else step
        with named_layer(f"blocks 0 to {self.depth - 1}"):
            x, _ = jax.lax.scan(step, x, nnx.state(self.blocks))
        return layers.unpatched(self.head(x, condition), self.patch)


def positions(height: int, width: int, channels: int) -> np.ndarray:
    """(height, width, channels) float32: of the column, then of the row, sines and then cosines of rates 1 to 1e-4."""
    rates = 10_000.0 ** -(np.arange(channels // 4) / (channels // 4))
    row, column = (np.arange(size)[:, None] * rates for size in (height, width))
    row, column = (np.concatenate([np.sin(angles), np.cos(angles)], axis=1) for angles in (row, column))
    shape = height, width, channels // 2
    maps = np.broadcast_to(column[None], shape), np.broadcast_to(row[:, None], shape)
    return np.concatenate(maps, axis=-1).astype(np.float32)
