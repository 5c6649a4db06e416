import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import weights
from pallas_kernels.stability import LOGIT_FLOOR


@pytest.mark.parametrize("sign", [-1, 1])
def test_weights_by_approximate_powers_are_within_a_millionth(monkeypatch, sign):
    """Compared with float64, with powers of two and reciprocals that have the largest error of the GPU's."""

    def wrong(x: jax.Array, error: float) -> jax.Array:
        side = np.where(np.arange(x.shape[0]) % 2, sign, -sign).astype(np.float32)
        return x * (1 + side * np.float32(error))

    monkeypatch.setattr(weights.jnp, "exp", lambda x: wrong(jnp.exp2(x * np.float32(np.log2(np.e))), 2**-22))
    monkeypatch.setattr(weights.instructions, "reciprocal", lambda x: wrong(1 / x, 2**-23))
    logits = np.random.default_rng(0).normal(0, 1, (3, 100_000)) * np.repeat([1, 4, 10, 20], 25_000)
    logits = logits.astype(np.float32)
    logits = np.maximum(logits, LOGIT_FLOOR)  # as the kernels do
    parts, _ = weights.shares([jnp.asarray(logit) for logit in logits])
    pixel = jnp.arange(logits.shape[1])
    got = np.asarray(weights.normalise(parts, pixel, logits.shape[1]), np.float64)

    shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
    shares[0, 0] = shares[2, -1] = 0
    want = shares / shares.sum(axis=0)
    assert np.abs(got - want).max() < 1e-6
    assert np.all(got.sum(axis=0) == 1)
