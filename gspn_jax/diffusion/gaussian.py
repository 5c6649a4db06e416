"""Gaussian diffusion in discrete time: DDPM (arXiv 2006.11239) with the learned variances of arXiv 2102.09672.

Steps t count from data (t = 0) to noise (t = T - 1): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, where abar is
the running product of 1 - beta. A denoiser is a callable (x_t (B, ..., C), timestep (B,)) that returns the predicted
noise, (B, ..., C), or (B, ..., 2 C) with the variance channels after it.
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
    """The distribution of x_{t-1} that a denoiser predicts.

    Attributes:
        mean: (B, ..., C), in the dtype of x_t.
        log_variance: the logarithm of its variance, like `mean`.
        x_start: the predicted x_0, like `mean`.
    """

    mean: jax.Array
    log_variance: jax.Array
    x_start: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """A process of T = len(betas) steps. Tables are float64; arrays are computed in the dtype of x.

    Attributes:
        betas: (T,) float64, in (0, 1).
        timesteps: (T,) integers, the denoiser's timestep input at each step: 0 .. T - 1 unless the process is respaced.

    Raises:
        ValueError: betas outside (0, 1), or another number of timesteps than of betas.
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
        """Returns the process whose betas grow linearly; the defaults are those of DDPM and DiT."""
        return cls(np.linspace(first, last, num_steps), np.arange(num_steps))

    @classmethod
    def scaled_linear(cls, first: float = 0.00085, last: float = 0.012, num_steps: int = 1000) -> "GaussianDiffusion":
        """Returns the process whose betas' square roots grow linearly; the defaults are Stable Diffusion's."""
        return cls(np.linspace(first**0.5, last**0.5, num_steps) ** 2, np.arange(num_steps))

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return len(self.betas)

    @functools.cached_property
    def alphas_bar(self) -> np.ndarray:
        """abar, (T,): the data's share of the variance of x_t."""
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def alphas_bar_before(self) -> np.ndarray:
        """abar of step t - 1, (T,); 1 at t = 0."""
        return np.append(1.0, self.alphas_bar[:-1])

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """The variance of q(x_{t-1} | x_t, x_0), (T,); 0 at t = 0 (DDPM, equation 7)."""
        return self.betas * (1 - self.alphas_bar_before) / (1 - self.alphas_bar)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """The logarithm of `posterior_variance`, (T,); t = 0 takes the value of t = 1, since log 0 is infinite."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @functools.cached_property
    def posterior_mean_of_start(self) -> np.ndarray:
        """The coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0), (T,) (DDPM, equation 7)."""
        return self.betas * np.sqrt(self.alphas_bar_before) / (1 - self.alphas_bar)

    @functools.cached_property
    def posterior_mean_of_current(self) -> np.ndarray:
        """The coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0), (T,) (DDPM, equation 7)."""
        return (1 - self.alphas_bar_before) * np.sqrt(1 - self.betas) / (1 - self.alphas_bar)

    def respaced(self, num_steps: int) -> "GaussianDiffusion":
        """Returns the process that visits `num_steps` evenly spaced steps, the first and the last among them.

        Raises:
            ValueError: num_steps is below 2 or above T.
        """
        if not 2 <= num_steps <= self.num_steps:
            raise ValueError(f"num_steps: expected 2 to {self.num_steps}, got {num_steps}")
        kept = np.round(np.arange(num_steps) * ((self.num_steps - 1) / (num_steps - 1))).astype(int)
        alphas_bar = self.alphas_bar[kept]
        return GaussianDiffusion(1 - alphas_bar / np.append(1.0, alphas_bar[:-1]), self.timesteps[kept])

    def noised(self, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns x_t, (B, ...) (DDPM, equation 4).

        Args:
            x_start: data x_0, (B, ...).
            t: steps of this process, (B,) integers, or () for one step that all share.
            noise: standard normal, (B, ...).
        """
        return _at(np.sqrt(self.alphas_bar), t, x_start) * x_start + _at(np.sqrt(1 - self.alphas_bar), t, noise) * noise

    def start_of(self, x_t: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns x_0, the inverse of `noised`: x_t, noise (B, ...) and t (B,) or () to (B, ...)."""
        return _at(1 / np.sqrt(self.alphas_bar), t, x_t) * x_t - _at(np.sqrt(1 / self.alphas_bar - 1), t, noise) * noise

    def posterior(self, x_start: jax.Array, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log variance of q(x_{t-1} | x_t, x_0), both (B, ...) (DDPM, equations 6 and 7)."""
        of_start, of_current = self.posterior_mean_of_start, self.posterior_mean_of_current
        mean = _at(of_start, t, x_t) * x_start + _at(of_current, t, x_t) * x_t
        return mean, jnp.broadcast_to(_at(self.posterior_log_variance, t, x_t), x_t.shape)

    def predicted(self, output: jax.Array, x_t: jax.Array, t: jax.Array, *, clip: float | None = None) -> Posterior:
        """Returns the distribution of x_{t-1} that a denoiser's output predicts.

        Args:
            output: (B, ..., C), the predicted noise; the variance is then the posterior's. Or (B, ..., 2 C) with
                variance channels v, which interpolate the log variance between the posterior's (v = -1) and that of
                beta (v = 1) (arXiv 2102.09672, equation 15).
            x_t: (B, ..., C).
            t: (B,) integers, or () for one step that all share.
            clip: bound of the absolute value of the predicted x_0; None leaves it as it is.

        Raises:
            ValueError: output has neither C nor 2 C channels.
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
        """Returns the hybrid loss of each sample (arXiv 2102.09672, equation 16, with lambda T = 1).

        The variational bound trains the variance only: its mean takes no gradient.

        Args:
            denoiser: called with the process's `timesteps` at t.
            x_start: data on -1 .. 1, (B, ..., C).
            t: (B,) integers, steps of this process.
            noise: standard normal, (B, ..., C).

        Returns:
            "mse" of the noise, "vb", the variational bound in bits per element, and "loss", their sum; each (B,), an
            average over the elements of a sample. "vb" is missing if the denoiser has no variance channels.
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
    """Returns the prediction (B, ..., C) and the variance channels (B, ..., C), None if the output has none.

    Args:
        output: (B, ..., C) or (B, ..., 2 C), returned by a denoiser.
        channels: C.

    Raises:
        ValueError: another number of channels.
    """
    if output.shape[-1] == channels:
        return output, None
    if output.shape[-1] != 2 * channels:
        raise ValueError(f"denoiser: expected {channels} or {2 * channels} channels, got {output.shape}")
    return output[..., :channels], output[..., channels:]


def _at(table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
    """Returns table[t] in the dtype of `like`, with axes of length 1 appended so that it broadcasts to `like`."""
    values: Any = jnp.asarray(table, like.dtype)[t]  # (B,) or (), then (B, 1, ..., 1)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _average(values: jax.Array) -> jax.Array:
    """Returns the average of each sample: (B, ...) to (B,)."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _divergence(mean: jax.Array, log_variance: jax.Array, other_mean: jax.Array, other: jax.Array) -> jax.Array:
    """Returns the Kullback-Leibler divergence KL(N(mean) || N(other_mean)) of each element, in nats."""
    distance = jnp.square(mean - other_mean) * jnp.exp(-other)
    return 0.5 * (other - log_variance + jnp.exp(log_variance - other) + distance - 1)


def _discretised_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Returns log p(x) of each element, in nats (DDPM, equation 13).

    The Gaussian is integrated over the bin of x. Bins are 2 / 255 wide, from -1 to 1; the first and the last are open.
    """
    inverse = jnp.exp(-log_scale)
    above = _normal_cdf(inverse * (x - mean + 1 / 255))
    below = _normal_cdf(inverse * (x - mean - 1 / 255))
    inside = jnp.where(x > 0.999, 1 - below, above - below)
    return jnp.log(jnp.maximum(jnp.where(x < -0.999, above, inside), 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """Returns the normal distribution function by the tanh approximation that DiT's program uses."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
