"""The text tower of CLIP (arXiv 2103.00020, section 2.4; OpenCLIP has the same), as Stable Diffusion reads it.

A transformer with causal attention over tokens: x += attention(norm(x)); x += MLP(norm(x)). Padding is attended to.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.models.depthwise import sum_dtype
from gspn_jax.models.layers import layer_norm
from gspn_jax.models.sizes import check_counts, check_positive
from gspn_jax.models.stack import graph_of, stacked


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns x sigmoid(1.702 x), an approximation of GELU that OpenAI's towers were trained with."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class CausalAttention(nnx.Module):
    """Multi-head softmax attention of each token over itself and those before it, (B, T, C) to (B, T, C)."""

    def __init__(self, width: int, *, num_heads: int, rngs: nnx.Rngs, **dtypes: Any):
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs, **dtypes) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        heads = batch, length, self.num_heads, width // self.num_heads
        query, key, value = (project(x).reshape(heads) for project in (self.query, self.key, self.value))
        # jax.nn.dot_product_attention takes a float32 softmax of float64 values too.
        wide = sum_dtype(query)
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=wide) * heads[-1] ** -0.5
        logits = jnp.where(jnp.tri(length, dtype=bool)[None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits).astype(value.dtype)
        return self.out(jnp.einsum("bhqk,bkhc->bqhc", weights, value).reshape(x.shape))


class CLIPLayer(nnx.Module):
    """Attention and an MLP as residual branches, each after a LayerNorm."""

    def __init__(
        self, width: int, hidden: int, *, num_heads: int, activation: str, epsilon: float, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.activation = ACTIVATIONS[activation]
        self.attention_norm, self.mlp_norm = (layer_norm(width, epsilon=epsilon, rngs=rngs, **dtypes) for _ in range(2))
        self.attention = CausalAttention(width, num_heads=num_heads, rngs=rngs, **dtypes)
        self.widen = nnx.Linear(width, hidden, rngs=rngs, **dtypes)
        self.narrow = nnx.Linear(hidden, width, rngs=rngs, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, T, C) in the dtype of x, the residual stream, which is at least float32."""
        x += self.attention(self.attention_norm(x)).astype(x.dtype)
        return x + self.narrow(self.activation(self.widen(self.mlp_norm(x)))).astype(x.dtype)


class CLIPText(nnx.Module):
    """A text tower: token ids to hidden states and one vector a text."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        *,
        hidden: int,
        num_heads: int,
        length: int = 77,
        projection: int | None = None,
        activation: str = "quick_gelu",
        epsilon: float = 1e-5,
        end: int | None = None,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the layers.

        Args:
            vocabulary: number of tokens.
            width: channels of the hidden states.
            depth: number of layers.
            hidden: channels inside an MLP.
            num_heads: of the attention, a divisor of width.
            length: tokens in the longest text.
            projection: channels of "pooled"; None leaves out the projection.
            activation: of the MLPs, "quick_gelu" (OpenAI's towers) or "gelu" (OpenCLIP's), the exact one.
            epsilon: of the norms.
            end: id of the token whose position "pooled" reads; None reads that of the largest id.
            dtype: dtype of the computation. Norms' statistics, softmax and residual stream are float32, or float64
                where it is.
            param_dtype: dtype of the parameters.
            rngs: source of the initial parameters.

        Raises:
            ValueError: an argument out of range; the message names it.
        """
        check_counts(vocabulary=vocabulary, width=width, depth=depth, hidden=hidden, num_heads=num_heads, length=length)
        check_counts(projection=projection)
        check_positive(epsilon=epsilon)
        if width % num_heads:
            raise ValueError(f"num_heads: expected a divisor of width = {width}, got {num_heads}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        dtypes: Any = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))
        self.length, self.end = length, end
        block = functools.partial(
            CLIPLayer, width, hidden, num_heads=num_heads, activation=activation, epsilon=epsilon, **dtypes
        )
        init: Any = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=init, rngs=rngs, **dtypes)
        self.positions = nnx.Embed(length, width, embedding_init=init, rngs=rngs, **dtypes)
        self.layers = stacked(block, depth, rngs)
        self.layer = graph_of(block)
        self.norm = layer_norm(width, epsilon=epsilon, rngs=rngs, **dtypes)
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs, **dtypes)
        self.project = None if projection is None else linear(width, projection)

    def __call__(self, ids: jax.Array) -> dict[str, jax.Array]:
        """Encodes texts.

        Args:
            ids: tokens, (B, T) integers from 0, T at most `length`; those beyond the vocabulary give NaN.

        Returns:
            "last": hidden states after the last layer and the final norm, (B, T, width), as SD-1.5 uses them;
            "penultimate": those before the last layer, without a norm, (B, T, width), as SDXL uses them;
            "pooled": the vector of "last" at the end of the text, projected where the tower has a projection,
            (B, projection) or (B, width). All are float32, or float64 where the dtype of the computation is.

        Raises:
            ValueError: ids of another shape or kind.
        """
        if ids.ndim != 2 or ids.shape[1] > self.length or not jnp.issubdtype(ids.dtype, jnp.integer):
            expected = f"integers of shape (B, T), T at most {self.length}"
            raise ValueError(f"ids: expected {expected}, got {ids.dtype} of shape {ids.shape}")
        x = self.tokens(ids)
        wide = sum_dtype(x)
        x = x.astype(wide) + self.positions(jnp.arange(ids.shape[1])).astype(wide)[None]

        def step(states: tuple[jax.Array, jax.Array], parameters: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
            x, _ = states
            return (nnx.merge(self.layer, parameters)(x), x), None

        (x, penultimate), _ = jax.lax.scan(step, (x, x), nnx.state(self.layers))
        last = self.norm(x)
        position = jnp.argmax(ids if self.end is None else ids == self.end, axis=1)  # the first of several
        pooled = last[jnp.arange(len(ids)), position]
        pooled = pooled if self.project is None else self.project(pooled)
        return {"last": last.astype(wide), "penultimate": penultimate, "pooled": pooled.astype(wide)}
