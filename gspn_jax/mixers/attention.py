"""Softmax self-attention: the baseline."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers.arguments import check_map, checked_heads


def dot_product_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Returns softmax(query key^T / sqrt(C)) value for each head, (B, N, heads, C), with a softmax of at least float32.

    Args:
        query: (B, N, heads, C).
        key, value: (B, M, heads, C).
    """
    if query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(query, key, value)
    # JAX's takes a float32 softmax of float64 values too.
    weights = jax.nn.softmax(jnp.einsum("bnhc,bmhc->bhnm", query, key) * query.shape[-1] ** -0.5)
    return jnp.einsum("bhnm,bmhc->bnhc", weights, value)


class SoftmaxAttention(nnx.Module):
    """Multi-head softmax self-attention over all pixels of a map, (B, H, W, C) to (B, H, W, C).

    It has no positional embedding, like GSPN. In the classifiers, the depthwise convolution before it sees positions.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int | None = None,
        use_bias: bool = False,
        out_bias: bool | None = None,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the projections.

        Args:
            features: C, the channels of the map.
            num_heads: a divisor of C; None takes the largest divisor that gives each head at least 32 channels.
            use_bias: whether the projections have biases.
            out_bias: whether the last projection has one; None: as the others.
            dtype: dtype of the computation; the softmax is at least float32.
            param_dtype: dtype of the parameters.
            rngs: source of the initial parameters.

        Raises:
            ValueError: features is less than 1, or num_heads does not divide it.
        """
        self.num_heads = checked_heads(features, num_heads)
        out_bias = use_bias if out_bias is None else out_bias
        options: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.qkv = nnx.Linear(features, 3 * features, use_bias=use_bias, **options)
        self.out = nnx.Linear(features, features, use_bias=out_bias, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, H, W, C) in the dtype of the computation, for x (B, H, W, C); ValueError for another shape."""
        features = self.qkv.in_features
        check_map(x, features)
        batch, height, width, _ = x.shape
        # (B, H, W, 3 C) to three of (B, H W, heads, C / heads)
        shape = (batch, height * width, 3, self.num_heads, features // self.num_heads)
        query, key, value = jnp.moveaxis(self.qkv(x).reshape(shape), 2, 0)
        return self.out(dot_product_attention(query, key, value).reshape(x.shape))
