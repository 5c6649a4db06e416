"""Convolutional parts that the autoencoder and the UNet of latent diffusion (arXiv 2112.10752) share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class ResBlock(nnx.Module):
    """Residual block of two (group norm, SiLU, 3x3 convolution); the shortcut is a 1x1 convolution if widths differ.

    A condition, such as an embedding of the timestep, is projected and added to every pixel between the two.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        condition_width: int | None = None,
        norm_groups: int,
        epsilon: float = 1e-6,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the layers.

        Args:
            inputs, outputs: channels.
            condition_width: channels of the condition; None: the block takes none.
            norm_groups: groups of the norms, a divisor of inputs and outputs.
            epsilon: of the norms.
            dtype: dtype of the computation; statistics are at least float32.
            param_dtype: dtype of the parameters.
            rngs: source of the initial parameters.
        """
        options: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.first_norm = group_norm(inputs, norm_groups, epsilon=epsilon, **options)
        self.first = conv(inputs, outputs, 3, **options)
        self.condition = None if condition_width is None else nnx.Linear(condition_width, outputs, **options)
        self.second_norm = group_norm(outputs, norm_groups, epsilon=epsilon, **options)
        self.second = conv(outputs, outputs, 3, **options)
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, 1, **options)

    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """Returns (B, H, W, outputs).

        Args:
            x: (B, H, W, inputs).
            condition: (B, condition_width), where the block takes one.
        """
        y = self.first(jax.nn.silu(self.first_norm(x)))
        if self.condition is not None:
            if condition is None:
                raise ValueError("condition: expected shape (B, condition_width), got None")
            y += self.condition(condition)[:, None, None]
        y = self.second(jax.nn.silu(self.second_norm(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


def group_norm(
    features: int,
    norm_groups: int,
    *,
    epsilon: float = 1e-6,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.GroupNorm:
    """Returns a GroupNorm whose statistics are at least float32, computed from centred values."""
    return nnx.GroupNorm(
        features, norm_groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


def conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Returns a convolution with bias, padded by `padding` zeros on every side; None keeps the size at stride 1."""
    padding = size // 2 if padding is None else padding
    return nnx.Conv(
        inputs, outputs, (size, size), strides=stride, padding=padding, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


def doubled(x: jax.Array) -> jax.Array:
    """Returns (B, 2 H, 2 W, C): each pixel of x (B, H, W, C) four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
