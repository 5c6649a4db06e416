import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.diffusion import guided
from gspn_jax.weights import facebook_dit, facebook_dit_sizes

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "dit_tiny.npz") as saved:
    GOLDEN = dict(saved)
ARRAYS = {name.removeprefix("param/"): array for name, array in GOLDEN.items() if name.startswith("param/")}
LATENTS = jnp.asarray(GOLDEN["latent"].transpose(0, 2, 3, 1), jnp.float32)
TIMESTEP, LABEL = jnp.asarray(GOLDEN["timestep"], jnp.float32), jnp.asarray(GOLDEN["label"], jnp.int32)


@functools.cache
def network():
    model = facebook_dit(ARRAYS, num_heads=4)
    return jax.jit(lambda *arrays: model(*arrays))


def test_outputs_of_the_authors_program():
    want = GOLDEN["out"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(network()(LATENTS, TIMESTEP, LABEL), want, atol=4e-6, rtol=0)


def test_guided_outputs_of_the_authors_program():
    """Theirs guides three channels of the first half of a batch, whose other half has no class."""
    scale = float(GOLDEN["guidance"])
    denoiser = guided(network(), LABEL[:2], scale=scale, no_class=10, channels=3)
    want = GOLDEN["out_guided"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(denoiser(LATENTS[:2], TIMESTEP[:2]), want[:2], atol=4e-6 * scale, rtol=0)
    np.testing.assert_array_equal(want[:2, ..., :3], want[2:, ..., :3])


def test_the_comparison_sees_other_heads():
    other = facebook_dit(ARRAYS, num_heads=2)(LATENTS, TIMESTEP, LABEL)
    assert np.abs(np.asarray(other) - GOLDEN["out"].transpose(0, 2, 3, 1)).max() > 1e-3


def test_sizes_are_read_off_the_shapes():
    sizes = dict(num_classes=10, width=48, depth=2, patch=2, in_channels=4, mlp_ratio=4.0)
    assert facebook_dit_sizes({"ema": ARRAYS}) == sizes


@pytest.mark.parametrize("changes,words", [
    ({"blocks.1.attn.qkv.bias": None}, "blocks.1.attn.qkv.bias, which is missing"),
    ({"extra": np.zeros(3)}, "1 more: extra"),
    ({"blocks.0.mlp.fc2.weight": np.zeros((48, 5))}, "blocks.0.mlp.fc2.weight to give"),
    ({"pos_embed": np.zeros((1, 16, 48))}, "expected sine-cosine positions"),
    ({"pos_embed": np.zeros((1, 15, 48))}, r"of a square map, \(1, N \* N, 48\), got \(1, 15, 48\)"),
])  # fmt: skip
def test_other_parameters_are_refused(changes, words):
    arrays = {name: array for name, array in {**ARRAYS, **changes}.items() if array is not None}
    with pytest.raises(ValueError, match=words):
        facebook_dit(arrays, num_heads=4)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of features = 48, got 5"):
        facebook_dit(ARRAYS, num_heads=5)
