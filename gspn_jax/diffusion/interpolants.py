"""Interpolants between noise and data (SiT, arXiv 2401.08740): x_t = alpha_t data + sigma_t noise, noise at t = 0.

A denoiser is a callable (x_t, t (B,)) -> velocity d x_t / dt. Everything else, the score and the drift of the reverse
process, follows from it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives in time, at some t."""

    alpha: jax.Array
    sigma: jax.Array
    alpha_dt: jax.Array
    sigma_dt: jax.Array


def _linear(t: jax.Array) -> Coefficients:
    one = jnp.ones_like(t)
    return Coefficients(t, 1 - t, one, -one)


def _gvp(t: jax.Array) -> Coefficients:
    rate = math.pi / 2
    angle = t * rate
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    return Coefficients(sine, cosine, rate * cosine, -rate * sine)


# "gvp", generalised variance-preserving: alpha^2 + sigma^2 = 1.
PATHS = {"linear": _linear, "gvp": _gvp}


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """A path by name: a key of `PATHS`."""

    path: str = "linear"

    def __post_init__(self):
        if self.path not in PATHS:
            raise ValueError(f"path: expected one of {', '.join(PATHS)}; got {self.path!r}")

    def coefficients(self, t: jax.Array, like: jax.Array) -> Coefficients:
        """To be multiplied with `like`, (B, ...). t: (B,), or one for all."""
        t = jnp.asarray(t, like.dtype)
        return PATHS[self.path](t.reshape(t.shape + (1,) * (like.ndim - t.ndim)))

    def noised(self, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t."""
        at = self.coefficients(t, x_start)
        return at.alpha * x_start + at.sigma * noise

    def velocity(self, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """d x_t / dt: what the denoiser learns."""
        at = self.coefficients(t, x_start)
        return at.alpha_dt * x_start + at.sigma_dt * noise

    def drift(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Of the process that takes data to noise, in its own direction of time: -(alpha' / alpha) x; t > 0."""
        at = self.coefficients(t, x)
        return -(at.alpha_dt / at.alpha) * x

    def diffusion(self, t: jax.Array, like: jax.Array) -> jax.Array:
        """Its diffusion, w in velocity = -drift + w score, to be multiplied with `like`; t > 0."""
        at = self.coefficients(t, like)
        return at.alpha_dt / at.alpha * at.sigma**2 - at.sigma * at.sigma_dt

    def score(self, velocity: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """The gradient of the log density, from a velocity; t < 1."""
        at = self.coefficients(t, x)
        # velocity = (alpha' / alpha) (x - sigma noise) + sigma' noise, and score = -noise / sigma.
        return (at.alpha * velocity - at.alpha_dt * x) / (at.sigma * (at.alpha_dt * at.sigma - at.alpha * at.sigma_dt))

    def losses(self, denoiser: Denoiser, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """ "loss": the mean squared error of the velocity of each sample, (B,)."""
        error = denoiser(self.noised(x_start, t, noise), t) - self.velocity(x_start, t, noise)
        return {"loss": jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))}
