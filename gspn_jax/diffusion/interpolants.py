"""Interpolants between noise and data (SiT, arXiv 2401.08740): x_t = alpha_t data + sigma_t noise, noise at t = 0.

A denoiser is a callable (x_t (B, ..., C), t (B,)) -> velocity d x_t / dt, (B, ..., C). The score and the drift of the
reverse process follow from the velocity.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


class Coefficients(NamedTuple):
    """Coefficients of the interpolant at time t, arrays like t.

    Attributes:
        alpha: factor of the data.
        sigma: factor of the noise.
        alpha_dt: derivative of alpha with respect to t.
        sigma_dt: derivative of sigma with respect to t.
    """

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


# "gvp" is generalised variance-preserving: alpha^2 + sigma^2 = 1.
PATHS = {"linear": _linear, "gvp": _gvp}


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """An interpolant between noise and data.

    Attributes:
        path: its coefficients, a key of `PATHS`.

    Raises:
        ValueError: an unknown path.
    """

    path: str = "linear"

    def __post_init__(self):
        if self.path not in PATHS:
            raise ValueError(f"path: expected one of {', '.join(PATHS)}; got {self.path!r}")

    def coefficients(self, t: jax.Array, like: jax.Array) -> Coefficients:
        """Returns the coefficients at t, (B,) or (), in the dtype of `like` (B, ...) and broadcastable to it."""
        t = jnp.asarray(t, like.dtype)  # (B,) or (), then (B, 1, ..., 1)
        return PATHS[self.path](t.reshape(t.shape + (1,) * (like.ndim - t.ndim)))

    def noised(self, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns x_t, (B, ...), from data and noise (B, ...) and t (B,) or ()."""
        at = self.coefficients(t, x_start)
        return at.alpha * x_start + at.sigma * noise

    def velocity(self, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns d x_t / dt, (B, ...), the denoiser's training target."""
        at = self.coefficients(t, x_start)
        return at.alpha_dt * x_start + at.sigma_dt * noise

    def drift(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Returns the drift of the process from data to noise, -(alpha' / alpha) x, (B, ...); t > 0.

        The process runs backwards in t.
        """
        at = self.coefficients(t, x)
        return -(at.alpha_dt / at.alpha) * x

    def diffusion(self, t: jax.Array, like: jax.Array) -> jax.Array:
        """Returns w in velocity = -drift + w score, broadcastable to `like` (B, ...); t > 0."""
        at = self.coefficients(t, like)
        return at.alpha_dt / at.alpha * at.sigma**2 - at.sigma * at.sigma_dt

    def score(self, velocity: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Returns the gradient of the log density at x, (B, ...), from the velocity at x; t < 1 (SiT, section 2)."""
        at = self.coefficients(t, x)
        # velocity = (alpha' / alpha) (x - sigma noise) + sigma' noise, and score = -noise / sigma.
        return (at.alpha * velocity - at.alpha_dt * x) / (at.sigma * (at.alpha_dt * at.sigma - at.alpha * at.sigma_dt))

    def losses(self, denoiser: Denoiser, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """Returns the loss of each sample.

        Args:
            denoiser: predicts the velocity.
            x_start: data, (B, ...).
            t: times in [0, 1], (B,).
            noise: standard normal, (B, ...).

        Returns:
            "loss": the mean squared error of the velocity, (B,).
        """
        error = denoiser(self.noised(x_start, t, noise), t) - self.velocity(x_start, t, noise)
        return {"loss": jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))}
