import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax import create_model
from gspn_jax.mixers import MIXERS, mixer_builder

NETWORKS: dict[str, dict[str, Any]] = dict(
    gspn_nano=dict(widths=(8,), depths=(1,), global_stages=()),
    gspn_s2=dict(width=8, depth=2),
    dit_s2=dict(width=8, depth=1),
)
OPTIONS: dict[str, dict[str, Any]] = dict(
    gspn=dict(proxy_rank=2),
    attention=dict(num_heads=2),
    linfusion=dict(num_heads=2),
    mamba=dict(state=2),
    mamba2=dict(state=2, head_dim=4),
)
PAIRS = list(zip(NETWORKS, ("linfusion", "mamba", "mamba2"), strict=True))


def run(network: str, mixer: str, x: jax.Array) -> jax.Array:
    options = NETWORKS[network] | OPTIONS[mixer]
    model = create_model(network, num_classes=3, mixer=mixer, rngs=nnx.Rngs(0), **options)
    return model(x) if network == "gspn_nano" else model(x, jnp.ones(len(x)), jnp.ones(len(x), int))


@pytest.mark.parametrize("network,mixer", [
    pytest.param(*pair, marks=[] if pair in PAIRS else pytest.mark.full)
    for pair in itertools.product(NETWORKS, MIXERS)
])  # fmt: skip
def test_every_network_takes_every_mixer(network, mixer):
    channels = 3 if network == "gspn_nano" else 4
    result = jax.eval_shape(lambda: run(network, mixer, jnp.ones((2, 8, 12, channels))))
    assert result.shape == ((2, 3) if network == "gspn_nano" else (2, 8, 12, 8)) and result.dtype == jnp.float32


@pytest.mark.full
@pytest.mark.parametrize("network,mixer", PAIRS)
def test_results_are_finite(network, mixer):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3 if network == "gspn_nano" else 4)), jnp.float32)
    assert np.all(np.isfinite(jax.jit(lambda x: run(network, mixer, x))(x)))


class Scale(nnx.Module):
    def __init__(self, features, *, dtype, rngs):
        self.scale = nnx.Param(jnp.ones(features, dtype))


def test_builders_drop_what_a_mixer_does_not_take():
    given: dict[str, Any] = dict(chunk=2, num_heads=4, param_dtype=jnp.bfloat16, dtype=jnp.float32)

    def built(mixer: Any) -> Any:
        return nnx.eval_shape(lambda: mixer_builder(mixer, OPTIONS.get(mixer))(8, **given, rngs=nnx.Rngs(0)))

    mixers = {mixer: built(mixer) for mixer in MIXERS}
    assert mixers["gspn"].chunk == 2 and mixers["attention"].num_heads == mixers["linfusion"].num_heads == 4
    for mixer in mixers.values():
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(mixer))} == {jnp.dtype("bfloat16")}
    assert built(Scale).scale.dtype == jnp.float32
    taken: dict[str, Any] = {}

    def takes_any(features: int, **options: Any) -> nnx.Module:
        taken.update(options)
        return Scale(features, dtype=jnp.float32, rngs=nnx.Rngs(0))

    mixer_builder(takes_any)(8, **given)
    assert taken == given
