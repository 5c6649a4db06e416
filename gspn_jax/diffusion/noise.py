"""Noise of samples: a function of seed, sample and step alone, whatever the batch or the devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SampleNoise(NamedTuple):
    """Draws standard normal noise for samples that have numbers.

    Attributes:
      seed: of all samples.
      samples: (B,) int, which of them a batch holds.
    """

    seed: jax.Array | int
    samples: jax.Array

    def draw(self, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
        """(B, *shape) float32, of a sampler's step; 0 is what it starts from."""

        def of_sample(sample: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(self.seed), sample)
            return jax.random.normal(jax.random.fold_in(key, step), shape)

        return jax.vmap(of_sample)(jnp.asarray(self.samples))
