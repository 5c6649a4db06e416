"""Transformers on maps that also read a text, as in the UNets of latent diffusion (arXiv 2112.10752, section 3.3).

A block mixes the pixels by any mixer of `gspn_jax.mixers` (as published: softmax attention), lets every pixel read the
text by cross-attention, and ends with a gated MLP. The blocks of a transformer are stacked and run in a `jax.lax.scan`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers import MixerBuilder
from gspn_jax.mixers.attention import dot_product_attention
from gspn_jax.models.convolutional import group_norm
from gspn_jax.models.layers import layer_norm
from gspn_jax.models.stack import graph_of, stacked


class CrossAttention(nnx.Module):
    """Multi-head softmax attention of pixels (B, H, W, C) to tokens (B, T, D), to (B, H, W, C)."""

    def __init__(self, features: int, context_width: int, num_heads: int, **options: Any):
        """Initialises the projections; only the last has a bias. options: dtype, param_dtype and rngs."""
        if num_heads < 1 or features % num_heads:
            raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}")
        self.num_heads = num_heads
        self.query = nnx.Linear(features, features, use_bias=False, **options)
        self.key = nnx.Linear(context_width, features, use_bias=False, **options)
        self.value = nnx.Linear(context_width, features, use_bias=False, **options)
        self.out = nnx.Linear(features, features, **options)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        def heads(rows: jax.Array) -> jax.Array:
            """Returns (B, rows, heads, C / heads)."""
            return rows.reshape(rows.shape[0], -1, self.num_heads, rows.shape[-1] // self.num_heads)

        query, key, value = heads(self.query(x)), heads(self.key(context)), heads(self.value(context))
        return self.out(dot_product_attention(query, key, value).reshape(x.shape))


class GatedMLP(nnx.Module):
    """Linear to value and gate of 4 C channels each, value * GELU(gate), linear back (GEGLU, arXiv 2002.05202)."""

    def __init__(self, features: int, **options: Any):
        self.widen = nnx.Linear(features, 8 * features, **options)
        self.narrow = nnx.Linear(4 * features, features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.widen(x), 2, axis=-1)
        return self.narrow(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Mixer, cross-attention and gated MLP, each on the normalised map and added to it."""

    def __init__(
        self,
        features: int,
        *,
        mixer: MixerBuilder,
        num_heads: int,
        context_width: int,
        chunk: int | None,
        **options: Any,
    ):
        self.norm = layer_norm(features, **options)
        self.mixer = mixer(features, chunk=chunk, num_heads=num_heads, **options)
        self.cross_norm = layer_norm(features, **options)
        self.cross_attention = CrossAttention(features, context_width, num_heads, **options)
        self.mlp_norm = layer_norm(features, **options)
        self.mlp = GatedMLP(features, **options)

    def __call__(self, x: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the map and what the mixer added to it, both (B, H, W, C), for x (B, H, W, C), context (B, T, D)."""
        mixed = self.mixer(self.norm(x))
        x += mixed
        x += self.cross_attention(self.cross_norm(x), context)
        return x + self.mlp(self.mlp_norm(x)), mixed


class Transformer(nnx.Module):
    """Blocks between a group norm with a linear layer and another linear layer; the result is added to the map.

    Attributes:
        features: channels of the map.
        depth: number of blocks.
        blocks: their parameters, stacked on a first axis.
    """

    def __init__(
        self,
        features: int,
        depth: int,
        *,
        mixer: MixerBuilder,
        num_heads: int,
        context_width: int,
        chunk: int | None,
        norm_groups: int,
        remat: bool,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Initialises the layers.

        Args:
            features: C, the channels of the map.
            depth: number of blocks.
            mixer: called as mixer(C, chunk=..., num_heads=..., dtype=..., param_dtype=..., rngs=...); returns a module
                on maps.
            num_heads: of the cross-attention and, where it has heads, of the mixer.
            context_width: D, the channels of the text.
            chunk: lines after which the mixer's scans restart; None: never.
            norm_groups: groups of the group norm, a divisor of C.
            remat: recomputes each block in the backward pass instead of keeping its inner maps.
            dtype, param_dtype: dtype of the computation, and of the parameters.
            rngs: source of the initial parameters.
        """
        plain: Any = dict(dtype=dtype, param_dtype=param_dtype)
        block = functools.partial(
            TransformerBlock,
            features,
            mixer=mixer,
            num_heads=num_heads,
            context_width=context_width,
            chunk=chunk,
            **plain,
        )
        self.features, self.depth, self.remat = features, depth, remat
        self.norm = group_norm(features, norm_groups, rngs=rngs, **plain)
        self.project_in = nnx.Linear(features, features, rngs=rngs, **plain)
        self.blocks = stacked(block, depth, rngs)
        self.block = graph_of(block)
        self.project_out = nnx.Linear(features, features, rngs=rngs, **plain)

    def __call__(
        self, x: jax.Array, context: jax.Array, *, keep_mixed: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the map (B, H, W, C) and, with `keep_mixed`, what the mixers added, (depth, B, H, W, C), else None.

        Args:
            x: (B, H, W, C).
            context: the text, (B, T, D).
            keep_mixed: whether to return the mixers' outputs.
        """

        def step(x: jax.Array, state: Any) -> tuple[jax.Array, jax.Array | None]:
            x, mixed = nnx.merge(self.block, state)(x, context)
            return x, mixed if keep_mixed else None

        # A scan's body is compiled apart from the forward pass, so common subexpressions cannot undo the recomputation.
        step = jax.checkpoint(step, prevent_cse=False) if self.remat else step
        y, mixed = jax.lax.scan(step, self.project_in(self.norm(x)), nnx.state(self.blocks))
        return x + self.project_out(y), mixed
