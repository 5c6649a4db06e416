"""Softmax self-attention: the baseline."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

HEAD_WIDTH = 32


class SoftmaxAttention(nnx.Module):
    """Multi-head softmax self-attention over all pixels of a map, (B, H, W, C) to (B, H, W, C).

    Without positional embedding, like GSPN: in the classifiers the depthwise convolution before it sees positions.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int | None = None,
        use_bias: bool = False,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the projections.

        Args:
            features: C, the channels of the map.
            num_heads: a divisor of C; by default the largest number of heads of at least 32 channels that divides it.
            use_bias: whether the projections have biases.
            dtype: of the computation; the softmax is float32.
            param_dtype: of the parameters.
            rngs: source of the initial parameters.
        """
        if not isinstance(features, numbers.Integral) or features < 1:
            raise ValueError(f"features: expected an integer of at least 1, got {features}")
        if num_heads is None:
            num_heads = next(n for n in range(max(features // HEAD_WIDTH, 1), 0, -1) if features % n == 0)
        if num_heads < 1 or features % num_heads:
            raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}")
        self.num_heads = num_heads
        options: Any = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.qkv = nnx.Linear(features, 3 * features, **options)
        self.out = nnx.Linear(features, features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        features = self.qkv.in_features
        if x.ndim != 4 or x.shape[-1] != features:
            raise ValueError(f"x: expected shape (B, H, W, {features}), got {x.shape}")
        batch, height, width, _ = x.shape
        # (B, H, W, 3 C) to three of (B, H W, heads, C / heads)
        shape = (batch, height * width, 3, self.num_heads, features // self.num_heads)
        query, key, value = jnp.moveaxis(self.qkv(x).reshape(shape), 2, 0)
        return self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))
