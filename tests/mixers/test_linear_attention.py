import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.mixers import LinFusionAttention
from tests.tolerances import assert_close


def numpy_attention(mixer, x):
    """Every token against every token, in float64: the weights of a token sum to nearly 1."""

    def parameter(variable):
        return np.asarray(variable[...], np.float64)

    def network(part, x):
        hidden = x @ parameter(part.widen.kernel) + parameter(part.widen.bias)
        centred = hidden - hidden.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        normed = normed * parameter(part.norm.scale) + parameter(part.norm.bias)
        return np.where(normed > 0, normed, 0.01 * normed) @ parameter(part.narrow.kernel) + parameter(part.narrow.bias)

    def positive(array):
        return np.where(array > 0, array + 1, np.exp(array))

    batch, height, width, features = x.shape
    tokens, heads = x.reshape(batch, -1, features), mixer.num_heads
    query = positive((tokens + network(mixer.query_network, tokens)) @ parameter(mixer.query.kernel))
    key = positive((tokens + network(mixer.key_network, tokens)) @ parameter(mixer.key.kernel))
    value = tokens @ parameter(mixer.value.kernel)
    mixed = np.zeros_like(value)
    for part in np.split(np.arange(features), heads):
        weights = query[..., part] @ key[..., part].swapaxes(1, 2) / tokens.shape[1]
        mixed[..., part] = weights @ value[..., part] / (weights.sum(-1, keepdims=True) + 1e-4)
    return (mixed @ parameter(mixer.out.kernel) + parameter(mixer.out.bias)).reshape(x.shape)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 3e-6), ("bfloat16", 0.02)])
def test_agrees_with_the_formula(dtype, tolerance):
    mixer = LinFusionAttention(12, num_heads=3, inner=5, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graph, state = nnx.split(mixer)
    # no bias is zero, no scale is one
    state = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), state)
    mixer = nnx.merge(graph, state)
    x = rng.normal(size=(2, 3, 5, 12))
    with jax.numpy_dtype_promotion("standard"):  # flax's layers mix float32 parameters with bfloat16 maps
        got = jax.jit(lambda x: mixer(x))(jnp.asarray(x, dtype))
    assert_close(got, numpy_attention(mixer, x), dtype=dtype, tolerance=tolerance)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        LinFusionAttention(8, num_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="inner: expected an integer of at least 1, got 0"):
        LinFusionAttention(8, inner=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, H, W, 8\), got \(1, 3, 8\)"):
        LinFusionAttention(8, rngs=nnx.Rngs(0))(jnp.zeros((1, 3, 8)))
