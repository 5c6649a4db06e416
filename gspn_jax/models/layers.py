"""Layers that several networks share, as the authors' programs define them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers.gspn import FAN_IN_UNIFORM
from gspn_jax.models.depthwise import depthwise_conv, sum_dtype

# Of their linear layers. Theirs is cut off at 100 standard deviations: never.
NORMAL = nnx.initializers.normal(0.02)


class LayerNorm(nnx.LayerNorm):
    """Keeps its input for the gradient, and not the five float32 maps on the way from it to the result."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.checkpoint(super().__call__)(x)


def layer_norm(features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, epsilon: float = 1e-5) -> LayerNorm:
    """LayerNorm over channels, statistics in float32 from centred values."""
    return LayerNorm(features, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


def conv3x3(inputs: int, outputs: int, stride: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """3x3 convolution with bias and a border of one zero on every side: H becomes ceil(H / stride)."""
    bound = (9 * inputs) ** -0.5

    def bias_init(key, shape, dtype, **unused):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Conv(
        inputs, outputs, (3, 3), strides=stride, padding=1, kernel_init=FAN_IN_UNIFORM, bias_init=bias_init,
        dtype=dtype, rngs=rngs,
    )  # fmt: skip


class DepthwiseConv(nnx.Module):
    """n x n depthwise convolution, (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, features: int, size: int, *, use_bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        bound = 1 / size  # fan in is size * size
        self.dtype = dtype
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), (size, size, 1, features), minval=-bound, maxval=bound)
        )
        bias = jax.random.uniform(rngs.params(), (features,), minval=-bound, maxval=bound) if use_bias else None
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = depthwise_conv(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[None, None, None]


class GlobalResponseNorm(nnx.Module):
    """GRN of ConvNeXt V2: each channel scaled by its norm over the map, relative to the mean of the channels' norms."""

    def __init__(self, features: int, *, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = sum_dtype(x)
        wide = x.astype(dtype)
        # The root of an all-zero map has no gradient: the tiny term gives it one, and is lost in any other sum.
        norm = jnp.sqrt(jnp.sum(wide * wide, axis=(1, 2), keepdims=True) + jnp.finfo(jnp.float32).tiny)
        relative = norm / (jnp.mean(norm, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (param[...].astype(dtype)[None, None, None] for param in (self.scale, self.bias))
        return (scale * (wide * relative) + bias + wide).astype(x.dtype)


class MLP(nnx.Module):
    """Linear, GELU, linear."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        kernel_init: nnx.Initializer = NORMAL,
        approximate: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """approximate: GELU by tanh instead of erf."""
        options: Any = dict(kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.approximate = approximate
        self.widen = nnx.Linear(features, hidden, **options)
        self.narrow = nnx.Linear(hidden, features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        # What the activation makes on its way is computed again for the gradient: two maps of the hidden width less.
        gelu = jax.checkpoint(functools.partial(jax.nn.gelu, approximate=self.approximate))
        return self.narrow(gelu(self.widen(x)))


def residual(x: jax.Array, branch: Callable[[jax.Array], jax.Array], rate: float, key: jax.Array | None) -> jax.Array:
    """x + branch(x) with stochastic depth: an image loses the branch with probability `rate`, else it counts
    1 / (1 - rate) times. `key` None keeps every branch."""
    y = branch(x)
    return x + (y if key is None or rate == 0 else drop_path(y, rate, key))


def drop_path(y: jax.Array, rate: float | jax.Array, key: jax.Array) -> jax.Array:
    """y (B, H, W, C), where an image is 0 with probability `rate`, which may be traced, else 1 / (1 - rate) times y."""
    keep = jax.random.bernoulli(key, 1 - rate, (y.shape[0], 1, 1, 1))
    return jnp.where(keep, y / jnp.asarray(1 - rate, y.dtype), 0)


def patches(maps: jax.Array, size: int) -> jax.Array:
    """(B, H, W, C) to (B, H / size, W / size, size * size * C); a patch is flattened as (row, column, channel)."""
    batch, height, width, channels = maps.shape
    maps = maps.reshape(batch, height // size, size, width // size, size, channels)
    return maps.swapaxes(2, 3).reshape(batch, height // size, width // size, size * size * channels)


def unpatched(tokens: jax.Array, size: int) -> jax.Array:
    """The way back: (B, H / size, W / size, size * size * C) to (B, H, W, C)."""
    batch, rows, columns, features = tokens.shape
    tokens = tokens.reshape(batch, rows, columns, size, size, features // size**2)
    return tokens.swapaxes(2, 3).reshape(batch, rows * size, columns * size, features // size**2)
