import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.mixers import SoftmaxAttention
from tests.tolerances import assert_close


def test_agrees_with_the_formula():
    mixer = SoftmaxAttention(12, num_heads=3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 12))
    tokens = x.reshape(2, 15, 12)
    query, key, value = (
        part.reshape(2, 15, 3, 4).transpose(0, 2, 1, 3)
        for part in np.split(tokens @ np.asarray(mixer.qkv.kernel[...], np.float64), 3, axis=-1)
    )
    scores = np.exp(query @ key.swapaxes(2, 3) / 2)  # sqrt(4) channels a head
    mixed = (scores / scores.sum(-1, keepdims=True)) @ value
    want = mixed.transpose(0, 2, 1, 3).reshape(2, 15, 12) @ np.asarray(mixer.out.kernel[...], np.float64)
    assert_close(mixer(jnp.asarray(x, jnp.float32)), want.reshape(x.shape), dtype="float32", tolerance=3e-6)


@pytest.mark.parametrize("features,heads", [(48, 1), (96, 3), (162, 3), (180, 5), (7, 1)])
def test_default_heads_divide_the_features(features, heads):
    mixer = nnx.eval_shape(lambda: SoftmaxAttention(features, rngs=nnx.Rngs(0)))
    assert mixer.num_heads == heads


@pytest.mark.parametrize("options,biases", [
    ({}, (False, False)), (dict(use_bias=True), (True, True)), (dict(out_bias=True), (False, True)),
    (dict(use_bias=True, out_bias=False), (True, False)),
])  # fmt: skip
def test_biases(options, biases):
    mixer = nnx.eval_shape(lambda: SoftmaxAttention(8, rngs=nnx.Rngs(0), **options))
    assert tuple(layer.bias is not None for layer in (mixer.qkv, mixer.out)) == biases


def test_bad_heads():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of features = 8, got 3"):
        SoftmaxAttention(8, num_heads=3, rngs=nnx.Rngs(0))
