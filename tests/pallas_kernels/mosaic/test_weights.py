import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import weights


@pytest.mark.parametrize("sign", [-1, 1])
def test_weights_by_approximate_powers_are_within_a_millionth(monkeypatch, sign):
    """Compared with float64, with powers of two that have the largest error of the GPU's, of either sign."""

    def power(x: jax.Array) -> jax.Array:
        side = np.where(np.arange(x.shape[0]) % 2, sign, -sign).astype(np.float32)
        return jnp.exp2(x * np.float32(np.log2(np.e))) * (1 + side * np.float32(2**-22))

    monkeypatch.setattr(weights.jnp, "exp", power)
    logits = np.random.default_rng(0).normal(0, 1, (3, 100_000)) * np.repeat([1, 4, 10, 20], 25_000)
    logits = logits.astype(np.float32)
    parts, _ = weights.shares([jnp.asarray(logit) for logit in logits])
    pixel = jnp.arange(logits.shape[1])
    got = np.asarray(weights.normalise(parts, pixel, logits.shape[1]), np.float64)

    shares = 1 / (1 + np.exp(-np.maximum(logits.astype(np.float64), -27)))
    shares[0, 0] = shares[2, -1] = 0
    want = shares / shares.sum(axis=0)
    assert np.abs(got - want).max() < 1e-6
    assert np.all(got.sum(axis=0) == 1)
