"""LinFusion's linear attention (arXiv 2409.02097): not causal, normalised, with two small networks before its kernels.

The widths and the order of operations are those of the authors' program.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers.arguments import check_counts, check_map, checked_heads
from gspn_jax.mixers.gspn import FAN_IN_UNIFORM
from pallas_kernels.checks import state_dtype

# Added to the sum that a result is divided by.
EPSILON = 1e-4


class SmallNetwork(nnx.Module):
    """Linear, LayerNorm, leaky ReLU, linear: features to inner channels and back."""

    def __init__(self, features: int, inner: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        options: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.widen = nnx.Linear(features, inner, kernel_init=FAN_IN_UNIFORM, **options)
        self.norm = nnx.LayerNorm(inner, epsilon=1e-5, use_fast_variance=False, **options)
        self.narrow = nnx.Linear(inner, features, kernel_init=FAN_IN_UNIFORM, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.narrow(jax.nn.leaky_relu(self.norm(self.widen(x)), 0.01))


class LinFusionAttention(nnx.Module):
    """Linear attention over all T = H W pixels of a map, (B, H, W, C) to (B, H, W, C). In each head:

        y_i = q_i (sum_j k_j^T v_j / T) / (q_i . mean_j k_j + 1e-4)
        q = elu(query(x + query_network(x))) + 1,    k = elu(key(x + key_network(x))) + 1,    v = value(x)

    The division makes y_i a weighted mean of the v_j at every size of map. `out`, with bias, follows.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int | None = None,
        inner: int | None = None,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the projections.

        Args:
            features: C, the channels of the map.
            num_heads: a divisor of C; None takes the largest divisor that gives each head at least 32 channels.
            inner: channels between the layers of the two small networks; None: C, as in the authors' SD-1.5 (C / 16 in
                their SDXL).
            dtype: dtype of the computation; sums over pixels and the division are float32 (float64 if it is float64).
            param_dtype: dtype of the parameters.
            rngs: source of the initial parameters.

        Raises:
            ValueError: an argument out of range; the message names it.
        """
        self.num_heads, self.dtype = checked_heads(features, num_heads), dtype
        inner = features if inner is None else inner
        check_counts(inner=inner)
        options: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        linear = functools.partial(nnx.Linear, features, features, kernel_init=FAN_IN_UNIFORM, **options)
        self.query, self.key, self.value = (linear(use_bias=False) for _ in range(3))
        self.query_network = SmallNetwork(features, inner, **options)
        self.key_network = SmallNetwork(features, inner, **options)
        self.out = linear()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, H, W, C) in the dtype of the computation, for x (B, H, W, C); ValueError for another shape."""
        features = self.query.in_features
        check_map(x, features)
        x = x.astype(self.dtype)
        # (B, H, W, C) to (B, T, heads, C / heads)
        shape = (x.shape[0], x.shape[1] * x.shape[2], self.num_heads, features // self.num_heads)
        query, key = (
            jax.nn.elu(project(x + network(x)).reshape(shape)) + 1
            for project, network in ((self.query, self.query_network), (self.key, self.key_network))
        )
        value, wide = self.value(x).reshape(shape), state_dtype(x)
        product = functools.partial(jnp.einsum, preferred_element_type=wide)
        summary = (product("bthd,bthe->bhde", key, value) / shape[1]).astype(self.dtype)
        mean = jnp.mean(key, axis=1, dtype=wide).astype(self.dtype)
        total = product("bthd,bhd->bth", query, mean)[..., None] + EPSILON
        mixed = jnp.einsum("bthd,bhde->bthe", query, summary).astype(wide) / total
        return self.out(mixed.astype(self.dtype).reshape(x.shape))
