"""Conditioning of denoisers on timestep and class, and the output head that the condition modulates."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.models import layers

FREQUENCIES = 128


def timestep_features(
    timestep: jax.Array, frequencies: int = FREQUENCIES, *, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Returns (B, 2 frequencies) in `dtype`: cosines, then sines, of timesteps times rates from 1 down to about 1e-4.

    Args:
        timestep: (B,) integers or floats.
        frequencies: number of rates; rate i is 10000 ** -(i / frequencies).
        dtype: of the result and all steps to it.
    """
    rates = jnp.exp(-math.log(10_000) / frequencies * jnp.arange(frequencies, dtype=dtype))
    angles = timestep.astype(dtype)[:, None] * rates[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Conditioning(nnx.Module):
    """Maps timestep (B,) and label (B,) to the sum of their embeddings, (B, width) float32.

    Labels are 0..num_classes. Label num_classes means "no class": training replaces some labels by it, and guidance
    uses it for the unconditional prediction. Any other label gives NaN.
    """

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        options: Any = dict(kernel_init=layers.NORMAL, rngs=rngs)
        self.first = nnx.Linear(2 * FREQUENCIES, width, **options)
        self.second = nnx.Linear(width, width, **options)
        self.label = nnx.Embed(num_classes + 1, width, embedding_init=layers.NORMAL, rngs=rngs)

    def __call__(self, timestep: jax.Array, label: jax.Array) -> jax.Array:
        return self.second(jax.nn.silu(self.first(timestep_features(timestep)))) + self.label(label)


def plain_norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a parameter-free LayerNorm over channels, with float32 results; the condition scales and shifts them."""
    return nnx.LayerNorm(width, epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False, rngs=rngs)


class AdaptiveHead(nnx.Module):
    """Maps tokens (B, H, W, C) to (B, H, W, outputs) float32: norm, scale and shift by the condition, linear layer.

    All its kernels start at zero, so a fresh network predicts zero.
    """

    def __init__(self, width: int, outputs: int, *, rngs: nnx.Rngs):
        zero = nnx.initializers.zeros
        self.modulation = nnx.Linear(width, 2 * width, kernel_init=zero, rngs=rngs)
        self.norm = plain_norm(width, rngs=rngs)
        self.linear = nnx.Linear(width, outputs, kernel_init=zero, rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        # condition (B, C) to shift and scale, (B, 1, 1, C) each
        shift, scale = jnp.split(self.modulation(jax.nn.silu(condition))[:, None, None], 2, axis=-1)
        return self.linear(self.norm(x.astype(jnp.float32)) * (1 + scale) + shift)
