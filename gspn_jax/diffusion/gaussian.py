"""Gaussian diffusion in discrete time: DDPM (arXiv 2006.11239) with the learned range of variances of arXiv 2102.09672.

Step t of T goes from data (t = 0) to noise (t = T - 1): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, where abar is
the running product of 1 - beta. A denoiser is a callable (x_t, timestep (B,)) -> prediction of the noise, with as many
channels again for the range of its variance, or without them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


class Posterior(NamedTuple):
    """What a model says of x_{t-1}, arrays like x_t."""

    mean: jax.Array
    log_variance: jax.Array
    x_start: jax.Array  # the prediction of x_0


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """A process of T = len(betas) steps; tables are float64, whatever depends on x is computed in x's dtype.

    Attributes:
      betas: (T,), in (0, 1).
      timesteps: (T,) int, what the denoiser is told at each step: other than 0 .. T - 1 in a respaced process.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    def __post_init__(self):
        if self.betas.ndim != 1 or not np.all((self.betas > 0) & (self.betas < 1)):
            raise ValueError(f"betas: expected a vector of numbers between 0 and 1, got {self.betas}")
        if self.timesteps.shape != self.betas.shape:
            raise ValueError(f"timesteps: expected one for each of {len(self.betas)} betas, got {self.timesteps.shape}")

    @classmethod
    def linear(cls, first: float = 1e-4, last: float = 0.02, num_steps: int = 1000) -> "GaussianDiffusion":
        """Betas in equal steps: those of DDPM and DiT by default."""
        return cls(np.linspace(first, last, num_steps), np.arange(num_steps))

    @classmethod
    def scaled_linear(cls, first: float = 0.00085, last: float = 0.012, num_steps: int = 1000) -> "GaussianDiffusion":
        """Square roots of betas in equal steps: those of Stable Diffusion by default."""
        return cls(np.linspace(first**0.5, last**0.5, num_steps) ** 2, np.arange(num_steps))

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def alphas_bar(self) -> np.ndarray:
        """abar, (T,): the share of the data's variance."""
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def alphas_bar_before(self) -> np.ndarray:
        """abar of the step before, 1 before the first."""
        return np.append(1.0, self.alphas_bar[:-1])

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Of q(x_{t-1} | x_t, x_0), (T,); 0 at t = 0."""
        return self.betas * (1 - self.alphas_bar_before) / (1 - self.alphas_bar)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm; at t = 0 that of t = 1."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @functools.cached_property
    def posterior_mean_of_start(self) -> np.ndarray:
        """What the mean of q(x_{t-1} | x_t, x_0) takes of x_0, (T,)."""
        return self.betas * np.sqrt(self.alphas_bar_before) / (1 - self.alphas_bar)

    @functools.cached_property
    def posterior_mean_of_current(self) -> np.ndarray:
        """And of x_t."""
        return (1 - self.alphas_bar_before) * np.sqrt(1 - self.betas) / (1 - self.alphas_bar)

    def respaced(self, num_steps: int) -> "GaussianDiffusion":
        """The process that visits so many of the steps, from the first to the last at equal distances.

        Raises:
          ValueError: fewer than 2, or more than there are.
        """
        if not 2 <= num_steps <= self.num_steps:
            raise ValueError(f"num_steps: expected 2 to {self.num_steps}, got {num_steps}")
        kept = np.round(np.arange(num_steps) * ((self.num_steps - 1) / (num_steps - 1))).astype(int)
        alphas_bar = self.alphas_bar[kept]
        return GaussianDiffusion(1 - alphas_bar / np.append(1.0, alphas_bar[:-1]), self.timesteps[kept])

    def noised(self, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t. x_start and noise: (B, ...); t: (B,) steps of this process, or one for all."""
        return _at(np.sqrt(self.alphas_bar), t, x_start) * x_start + _at(np.sqrt(1 - self.alphas_bar), t, noise) * noise

    def start_of(self, x_t: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """The x_0 that `noise` made x_t of."""
        return _at(1 / np.sqrt(self.alphas_bar), t, x_t) * x_t - _at(np.sqrt(1 / self.alphas_bar - 1), t, noise) * noise

    def posterior(self, x_start: jax.Array, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0)."""
        of_start, of_current = self.posterior_mean_of_start, self.posterior_mean_of_current
        mean = _at(of_start, t, x_t) * x_start + _at(of_current, t, x_t) * x_t
        return mean, jnp.broadcast_to(_at(self.posterior_log_variance, t, x_t), x_t.shape)

    def predicted(self, output: jax.Array, x_t: jax.Array, t: jax.Array, *, clip: float | None = None) -> Posterior:
        """What the output of a denoiser says of the step before.

        Args:
          output: (B, ..., C), the noise, whose variance is then that of the posterior; or (B, ..., 2 C): with the place
            of the logarithm of the variance between that of the posterior (-1) and of beta (1).
          clip: the predicted x_0 is kept within +-clip.
        """
        noise, between = split_output(output, x_t.shape[-1])
        x_start = self.start_of(x_t, t, noise)
        x_start = x_start if clip is None else jnp.clip(x_start, -clip, clip)
        mean, log_variance = self.posterior(x_start, x_t, t)
        if between is not None:
            share = (between + 1) / 2
            log_variance = share * _at(np.log(self.betas), t, x_t) + (1 - share) * log_variance
        return Posterior(mean, log_variance, x_start)

    def losses(self, denoiser: Denoiser, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """The hybrid loss of each sample, (B,): "mse" of the noise, "vb" the variational bound in bits, "loss" the sum.

        The bound teaches the variance alone: the mean in it takes no gradient. Without a learned variance there is no
        "vb". Each is an average over the elements of a sample.
        """
        x_t = self.noised(x_start, t, noise)
        output = denoiser(x_t, jnp.asarray(self.timesteps)[t])
        predicted, between = split_output(output, x_start.shape[-1])
        mse = _average(jnp.square(noise - predicted))
        if between is None:
            return {"loss": mse, "mse": mse}
        frozen = jnp.concatenate([jax.lax.stop_gradient(predicted), between], axis=-1)
        found = self.predicted(frozen, x_t, t)
        mean, log_variance = self.posterior(x_start, x_t, t)
        divergence = _average(_divergence(mean, log_variance, found.mean, found.log_variance))
        likelihood = _average(_discretised_log_likelihood(x_start, found.mean, found.log_variance / 2))
        vb = jnp.where(t == 0, -likelihood, divergence) / math.log(2)
        return {"loss": mse + vb, "mse": mse, "vb": vb}


def split_output(output: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """Prediction and, if there is one, what is said of its variance.

    Raises:
      ValueError: another number of channels.
    """
    if output.shape[-1] == channels:
        return output, None
    if output.shape[-1] != 2 * channels:
        raise ValueError(f"denoiser: expected {channels} or {2 * channels} channels, got {output.shape}")
    return output[..., :channels], output[..., channels:]


def _at(table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
    """The entries of a table, to be multiplied with (B, ...)."""
    values: Any = jnp.asarray(table, like.dtype)[t]
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _average(values: jax.Array) -> jax.Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _divergence(mean: jax.Array, log_variance: jax.Array, other_mean: jax.Array, other: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence of two Gaussians of each element, in nats."""
    distance = jnp.square(mean - other_mean) * jnp.exp(-other)
    return 0.5 * (other - log_variance + jnp.exp(log_variance - other) + distance - 1)


def _discretised_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Of x in bins of width 2 / 255 from -1 to 1, the outer ones open, in nats."""
    inverse = jnp.exp(-log_scale)
    above = _normal_cdf(inverse * (x - mean + 1 / 255))
    below = _normal_cdf(inverse * (x - mean - 1 / 255))
    inside = jnp.where(x > 0.999, 1 - below, above - below)
    return jnp.log(jnp.maximum(jnp.where(x < -0.999, above, inside), 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """By tanh, as the comparators compute it."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
