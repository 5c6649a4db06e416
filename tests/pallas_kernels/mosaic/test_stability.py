"""The stability-context condition in the kernels: rows of weights sum to exactly 1, so constants stay constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import line_scan_from_logits
from pallas_kernels.mosaic.tiles import Tile

SCALES = np.array([0.0, 0.1, 1, 3, 10, 30, 60, 100])
# How a kernel runs: pixels of a line, weight channels, tile.
PLANS = {
    "planned": (9, 8, None), "warpgroups": (17, 8, Tile(8, 16, 2)), "cut": (50, 8, Tile(8, 48, ghost=8)),
    "shared": (9, 1, None), "shared and cut": (130, 1, Tile(8, 128, ghost=32)),
}  # fmt: skip


def arrays(lines, pixels, weight_channels, start):
    """x = `start`, bfloat16 logits of all sizes, and lam = 1 on the first line, 0 after: all states are means of it."""
    scales = SCALES if weight_channels == 8 else np.resize(SCALES, (lines, pixels, 1, 1))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, lines, pixels, 3, weight_channels)) * scales)
    lam = jnp.zeros((1, lines, pixels, 8), jnp.bfloat16).at[:, 0].set(1)
    return jnp.broadcast_to(start, lam.shape).astype(jnp.float32), logits.astype(jnp.bfloat16), lam


def scan(implementation, tile):
    def run(*inputs):
        return line_scan_from_logits(*inputs, direction="down", implementation=implementation, tile=tile)

    return jax.jit(run)


def assert_constant_stays(implementation, lines, pixels, weight_channels, tile):
    inputs = arrays(lines, pixels, weight_channels, jnp.ones((1, 1, 1, 1)))
    h, vjp = jax.vjp(scan(implementation, tile), *inputs)
    np.testing.assert_array_equal(h, 1)
    of_x, of_logits, of_lam = vjp(jnp.ones_like(h))
    # No logit can move a mean of ones: sum_k w_k (1 - sigmoid_k) (g_k - mean) with all g_k alike.
    largest = np.abs(np.asarray(of_logits, np.float32)).max(axis=(0, 3, 4))
    reaching = np.abs(np.asarray(of_lam, np.float32)).max(axis=(0, 3))
    assert np.all(largest <= 1e-6 * reaching), (largest / reaching).max()
    # Rows sum to 1, so a line passes on the whole gradient that reaches it, and adds 1 for each of its pixels.
    total = np.asarray(of_lam, np.float64).sum(axis=(0, 2))
    wanted = pixels * np.arange(lines, 0, -1.0)[:, None]
    np.testing.assert_allclose(total, np.broadcast_to(wanted, total.shape), rtol=2e-3)  # of bfloat16 results
    of_first = np.asarray(of_x, np.float64)[:, 0].sum(axis=(0, 1))
    np.testing.assert_allclose(of_first, pixels * lines, rtol=1e-6 * lines**0.5)
    assert np.all(np.asarray(of_x)[:, 1:] == 0)


def assert_never_grows(implementation, lines, pixels, weight_channels, tile):
    start = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, pixels, 8)), jnp.float32)
    h = scan(implementation, tile)(*arrays(lines, pixels, weight_channels, start))
    largest = np.abs(np.asarray(h)).max(axis=(0, 2))
    # Each product and sum of a mean is rounded to 24 bits.
    assert np.all(largest[1:] <= largest[:-1] * (1 + 3e-7)) and np.all(largest[-1] > 0)


@pytest.mark.full
@pytest.mark.parametrize("plan", PLANS)
def test_a_constant_stays_interpreted(plan):
    pixels, weight_channels, tile = PLANS[plan]
    lines = (12 if pixels < 128 else 34) if tile and tile.ghost else 16  # launches of 8 or 32 lines
    assert_constant_stays("mosaic_interpret", lines, pixels, weight_channels, tile)


@pytest.mark.full
@pytest.mark.parametrize("plan", ["planned", "warpgroups"])
def test_a_state_never_grows_interpreted(plan):
    pixels, weight_channels, tile = PLANS[plan]
    assert_never_grows("mosaic_interpret", 32, pixels, weight_channels, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
def test_4096_lines(plan):
    pixels, weight_channels, tile = PLANS[plan]
    assert_constant_stays("mosaic", 4096, pixels, weight_channels, tile)
    assert_never_grows("mosaic", 4096, pixels, weight_channels, tile)
