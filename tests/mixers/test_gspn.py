from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.mixers import GSPNMixer
from gspn_jax.mixers.gspn import _padded_channels
from tests.pallas_kernels import numpy_scan
from tests.tolerances import assert_close


def numpy_mixer(mixer, x):
    """Computes the module's equations in float64, without padding."""

    def kernel(layer):
        return np.asarray(layer.kernel[...], np.float64)

    plain = keys = queries = x
    if mixer.query is not None:
        keys, queries, x = (x + x @ kernel(layer) for layer in (mixer.key, mixer.query, mixer.value))
    plain, keys, queries = (array @ kernel(mixer.proxy) for array in (plain, keys, queries))
    if mixer.reduce is not None:
        x = x @ kernel(mixer.reduce)
    logits = (plain @ kernel(mixer.logits)).reshape(*x.shape[:3], 4, 3, mixer.weight_channels)
    lam, gate, skip = (
        (proxy @ kernel(layer)).reshape(*x.shape[:3], 4, x.shape[-1])
        for proxy, layer in ((keys, mixer.lam), (queries, mixer.gate), (plain, mixer.skip))
    )
    maps = (x, logits, lam, gate, skip, np.asarray(mixer.merge[...], np.float64))
    propagate = numpy_scan.propagate if mixer.alignment == "aligned" else numpy_scan.propagate_unturned
    y = propagate(*maps, mixer.chunk)
    y = y if mixer.expand is None else y @ kernel(mixer.expand)
    return y if mixer.out is None else y @ kernel(mixer.out) + np.asarray(mixer.out.bias[...])


@pytest.mark.parametrize("features,options", [
    (5, dict(chunk=2)), (6, dict(propagation_channels=3, weight_channels=1)), (6, dict(alignment="unturned")),
    (6, dict(query_key_value=True, out_projection=True, propagation_channels=4, weight_channels=2, chunk=4)),
    *(pytest.param(features, options, marks=pytest.mark.full) for features, options in [
        (8, {}), (12, {}), (6, dict(weight_channels=1)), (12, dict(weight_channels=4)),
        (6, dict(query_key_value=True, alignment="unturned")),
        (10, dict(weight_channels=2, chunk=3)), (4, dict(propagation_channels=16)),
    ]),
])  # fmt: skip
def test_agrees_with_the_equations(features, options):
    mixer = GSPNMixer(features, proxy_rank=3, rngs=nnx.Rngs(0), **options)
    size = (5, 5) if options.get("alignment") == "unturned" else (4, 6)
    x = np.random.default_rng(0).normal(size=(2, *size, features))
    got = jax.jit(lambda array: mixer(array))(jnp.asarray(x, jnp.float32))
    assert_close(got, numpy_mixer(mixer, x), dtype="float32", tolerance=3e-6)


@pytest.mark.parametrize("channels,weight_channels,want", [
    (144, 144, (144, 1)), (162, 162, (168, 1)), (180, 1, (1, 184)), (180, 2, (2, 92)), (180, 60, (64, 3)), 
    (900, 900, (904, 1)), (1, 1, (8, 1)), (1152, 4, (4, 288)),
])  # fmt: skip
def test_propagates_a_multiple_of_8_channels(channels, weight_channels, want):
    got = _padded_channels(channels, weight_channels)
    assert got == want and got[0] * got[1] % 8 == 0


def test_parameters_have_no_padding():
    mixer = GSPNMixer(5, proxy_rank=3, weight_channels=1, rngs=nnx.Rngs(0))
    shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(mixer))}
    assert shapes == {
        "proxy/kernel": (5, 3), "logits/kernel": (3, 12), "lam/kernel": (3, 20), "gate/kernel": (3, 20),
        "skip/kernel": (3, 20), "merge": (4,),
    }  # fmt: skip


def test_bfloat16_stays_close_to_float32():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 9, 7, 16)), jnp.float32)
    mixers = (GSPNMixer(16, proxy_rank=4, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (jnp.float32, jnp.bfloat16))
    wide, narrow = (jax.jit(lambda x, mixer=mixer: mixer(x))(x) for mixer in mixers)
    assert_close(narrow, wide, dtype="bfloat16", tolerance=0.02)


def test_starts_like_a_convolution_of_its_fan_in():
    mixer = GSPNMixer(64, proxy_rank=16, rngs=nnx.Rngs(0))
    for layer, bound in ((mixer.proxy, 1 / 8), (mixer.lam, 1 / 4), (mixer.logits, 1 / 4)):
        kernel = np.abs(np.asarray(layer.kernel[...]))
        assert 0.99 * bound < kernel.max() <= bound
        assert abs(kernel.mean() - bound / 2) < 0.01
    assert np.all(np.abs(np.asarray(mixer.merge[...])) <= 0.5)


@pytest.mark.parametrize("options,words", [
    (dict(features=0), ("features", "at least 1", "0")), (dict(features=8.5), ("features", "an integer", "8.5")),
    (dict(proxy_rank=0), ("proxy_rank", "at least 1", "0")),
    (dict(weight_channels=3), ("weight_channels", "divisor of 8", "3")),
    (dict(propagation_channels=4, weight_channels=8), ("weight_channels", "divisor of 4", "8")),
    (dict(alignment="foo"), ("alignment", "unturned", "'foo'")), (dict(chunk=0), ("chunk", "at least 1", "0")),
    (dict(variant="bogus"), ("variant", "low_rank_on_chip", "'bogus'")),
])  # fmt: skip
def test_bad_arguments(options, words):
    with pytest.raises(ValueError) as error:
        GSPNMixer(**{"features": 8, **options}, rngs=nnx.Rngs(0))
    assert all(word in str(error.value) for word in words), str(error.value)


def loss_of(**options: Any):
    """Returns a small mixer's loss as a function of its parameters and a map, and these two arguments."""
    options |= dict(propagation_channels=4, weight_channels=2, query_key_value=True, out_projection=True)
    mixer = GSPNMixer(6, proxy_rank=3, rngs=nnx.Rngs(0), **options)
    graph, params = nnx.split(mixer)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 3, 6)), jnp.float32)
    return lambda params, x: jnp.sum(jnp.sin(nnx.merge(graph, params)(x))), params, x


def test_every_parameter_gets_a_gradient():
    loss, params, x = loss_of()
    gradients = jax.jit(jax.grad(loss))(params, x)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.full
def test_states_that_are_not_kept_give_the_same_gradients():
    gradients = []
    for keep_states in (True, False):
        loss, params, x = loss_of(keep_states=keep_states)
        gradients.append(jax.jit(jax.grad(loss))(params, x))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_array_equal(one, other)


def test_states_are_kept_only_if_asked_for():
    kept = []
    for keep_states in (True, False):
        loss, params, x = loss_of(keep_states=keep_states)
        residuals = jax.eval_shape(lambda *inputs, loss=loss: jax.vjp(loss, *inputs)[1], params, x)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(residuals) if leaf.shape == (1, 4, 3, 8)))
    assert kept[0] - kept[1] == 5 * 4 * 3 * 8  # h of four directions and the padded map, (1, 4, 3, 8) each
