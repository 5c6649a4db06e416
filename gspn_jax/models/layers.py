"""Layers that several networks share, defined as in the authors' programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gspn_jax.mixers.gspn import FAN_IN_UNIFORM
from gspn_jax.models.depthwise import depthwise_conv, sum_dtype

# Initialisation of linear layers. The authors truncate it at 100 standard deviations, which never happens.
NORMAL = nnx.initializers.normal(0.02)


def chained(*functions: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Returns the function that applies `functions` one after another and keeps only its input for the gradient.

    For cheap functions before a linear layer: the backward pass computes them again, but not the product.
    """

    def apply(x: jax.Array) -> jax.Array:
        for function in functions:
            x = function(x)
        return x

    return jax.checkpoint(apply)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm that keeps only its input for the gradient and recomputes five float32 maps in the backward pass."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.checkpoint(super().__call__)(x)


def layer_norm(
    features: int,
    *,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
    epsilon: float = 1e-5,
) -> LayerNorm:
    """Returns a LayerNorm over channels whose statistics are at least float32, computed from centred values."""
    return LayerNorm(
        features, epsilon=epsilon, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


def conv3x3(inputs: int, outputs: int, stride: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """Returns a 3x3 convolution with bias, padded by one zero on every side: H becomes ceil(H / stride)."""
    bound = (9 * inputs) ** -0.5

    def bias_init(key, shape, dtype, **unused):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Conv(
        inputs, outputs, (3, 3), strides=stride, padding=1, kernel_init=FAN_IN_UNIFORM, bias_init=bias_init,
        dtype=dtype, rngs=rngs,
    )  # fmt: skip


class DepthwiseConv(nnx.Module):
    """Depthwise convolution, (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, features: int, size: int, *, use_bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialises the kernel (size, size, 1, features), uniform in +-1 / size; `dtype` is the computation's."""
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
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808), (B, H, W, C) to (B, H, W, C).

    It scales each channel by its norm over the map, divided by the mean norm of the channels.
    """

    def __init__(self, features: int, *, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = sum_dtype(x)
        wide = x.astype(dtype)
        # The root has no gradient at an all-zero map. The tiny term gives it one and vanishes in any other sum.
        # (B, H, W, C) to (B, 1, 1, C)
        norm = jnp.sqrt(jnp.sum(wide * wide, axis=(1, 2), keepdims=True) + jnp.finfo(jnp.float32).tiny)
        relative = norm / (jnp.mean(norm, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (param[...].astype(dtype)[None, None, None] for param in (self.scale, self.bias))
        return (scale * (wide * relative) + bias + wide).astype(x.dtype)


def gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
    """Returns GELU of x in its dtype, by tanh if `approximate`, else by erf.

    JAX's exact form calls erfc, which takes 2.5 times as long on a CPU. 16-bit maps are computed in float32: in 1 + erf
    their rounding would swallow the values of negative x.
    """
    if approximate:
        return jax.nn.gelu(x)
    wide = x.astype(sum_dtype(x))
    return (wide * (0.5 * lax.erf(wide * 0.5**0.5) + 0.5)).astype(x.dtype)


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
        """Initialises two linear layers, features to hidden and back.

        Args:
            features: channels of the input and the output.
            hidden: channels between the layers.
            kernel_init: initialiser of both kernels.
            approximate: computes GELU by tanh instead of erf.
            dtype: dtype of the computation; parameters are float32.
            rngs: source of the initial parameters.
        """
        options: Any = dict(kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.approximate = approximate
        self.widen = nnx.Linear(features, hidden, **options)
        self.narrow = nnx.Linear(hidden, features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return chained(lambda hidden: gelu(hidden, approximate=self.approximate), self.narrow)(self.widen(x))


def residual(x: jax.Array, branch: Callable[[jax.Array], jax.Array], rate: float, key: jax.Array | None) -> jax.Array:
    """Returns x + branch(x), (B, H, W, C), with stochastic depth.

    Args:
        x: (B, H, W, C).
        branch: a function of x.
        rate: probability with which an image loses the branch; kept branches are multiplied by 1 / (1 - rate).
        key: PRNG key of stochastic depth; None keeps every branch.
    """
    y = branch(x)
    return x + (y if key is None or rate == 0 else drop_path(y, rate, key))


def drop_path(y: jax.Array, rate: float | jax.Array, key: jax.Array) -> jax.Array:
    """Returns y (B, H, W, C) with an image set to 0 with probability `rate`, else multiplied by 1 / (1 - rate).

    `rate` may be traced.
    """
    keep = jax.random.bernoulli(key, 1 - rate, (y.shape[0], 1, 1, 1))
    return jnp.where(keep, y / jnp.asarray(1 - rate, y.dtype), 0)


def patches(maps: jax.Array, size: int) -> jax.Array:
    """Returns patches as rows: (B, H, W, C) to (B, H / size, W / size, size * size * C).

    A patch is flattened in the order (row, column, channel).
    """
    batch, height, width, channels = maps.shape
    maps = maps.reshape(batch, height // size, size, width // size, size, channels)
    # Axes 2 and 3, a patch's row and the column of patches, change places.
    return maps.swapaxes(2, 3).reshape(batch, height // size, width // size, size * size * channels)


def unpatched(tokens: jax.Array, size: int) -> jax.Array:
    """Returns maps from rows of patches, the inverse of `patches`: (B, H / size, W / size, ...) to (B, H, W, C)."""
    batch, rows, columns, features = tokens.shape
    tokens = tokens.reshape(batch, rows, columns, size, size, features // size**2)
    return tokens.swapaxes(2, 3).reshape(batch, rows * size, columns * size, features // size**2)
