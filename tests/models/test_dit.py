from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.models import PRESETS, create_model, parameter_count
from gspn_jax.models.dit import positions

TINY: dict[str, Any] = dict(width=16, depth=2, num_heads=2)


def tiny(**options: Any):
    """Returns a small network without zero parameters."""
    options = {key: value for key, value in {**TINY, **options}.items() if value is not None}
    graph, state = nnx.split(nnx.eval_shape(lambda: create_model("dit_s2", num_classes=5, rngs=nnx.Rngs(0), **options)))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), state))


def inputs(height, width):
    latents = jnp.asarray(np.random.default_rng(1).normal(size=(2, height, width, 4)), jnp.float32)
    return latents, jnp.array([3.0, 700.0]), jnp.array([0, 5])


@pytest.mark.parametrize("name,millions", [("dit_s2", 33), ("dit_b2", 130), ("dit_l2", 458), ("dit_xl2", 675)])
def test_parameters_of_the_paper(name, millions):
    model = nnx.eval_shape(lambda: create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))
    fixed = 256 * PRESETS[name].options["width"]  # positions, which the paper counts
    assert abs((parameter_count(model) + fixed) / 1e6 - millions) < 0.6
    if name == "dit_xl2":
        assert parameter_count(model) + fixed == 675_129_632


@pytest.mark.parametrize(
    "options,size", [({}, (4, 6)), (dict(mixer="gspn", proxy_rank=2, num_heads=None), (6, 4)), (dict(patch=4), (8, 4))]
)
def test_any_size_depends_on_every_corner(options, size):
    model, (latents, timestep, label) = tiny(**options), inputs(*size)
    run = jax.jit(lambda latents: model(latents, timestep, label))
    out = run(latents)
    assert out.shape == (2, *size, 8) and out.dtype == jnp.float32 and np.all(np.isfinite(out))
    for row in (0, -1):
        for column in (0, -1):
            other = run(latents.at[:, row, column].add(1))
            assert np.abs(np.asarray(other - out)).max(axis=(0, 3)).min() > 0


@pytest.mark.full
def test_remat_and_fresh_networks():
    latents, timestep, label = inputs(4, 4)
    loss = lambda model: jnp.sum(jnp.sin(model(latents, timestep, label)))  # noqa: E731
    one, other = (nnx.jit(nnx.grad(loss))(tiny(remat=remat)) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.any(np.asarray(a) != 0)
    fresh = create_model("dit_s2", num_classes=5, rngs=nnx.Rngs(0), **TINY)
    assert np.all(np.asarray(fresh(latents, timestep, label)) == 0)


def test_positions_by_hand():
    found = positions(3, 4, 8)
    assert found.shape == (3, 4, 8) and found.dtype == np.float32
    np.testing.assert_allclose(found[2, 3], [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03),
                                             np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("options,words", [
    (dict(width=18), "width: expected a multiple of 4"),
    (dict(depth=0), "depth: expected an integer of at least 1, got 0"),
    (dict(num_heads=3), "num_heads: expected a divisor of features = 16, got 3"),
    (dict(rank=3), "rank: expected an option"),
])  # fmt: skip
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)
    with pytest.raises(ValueError, match="H and W divisible by patch = 2"):
        tiny()(*inputs(3, 4))
