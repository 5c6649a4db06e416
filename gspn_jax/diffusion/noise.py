"""Sampling noise that depends only on seed, sample number and step, not on the batch or the devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SampleNoise(NamedTuple):
    """Draws standard normal noise for numbered samples.

    Attributes:
        seed: shared by all samples.
        samples: (B,) integers, the numbers of the samples in the batch.
    """

    seed: jax.Array | int
    samples: jax.Array

    def draw(self, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
        """Returns noise (B, *shape) float32 for a sampler's step; step 0 gives the starting noise."""

        def of_sample(sample: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(self.seed), sample)
            return jax.random.normal(jax.random.fold_in(key, step), shape)

        return jax.vmap(of_sample)(jnp.asarray(self.samples))
