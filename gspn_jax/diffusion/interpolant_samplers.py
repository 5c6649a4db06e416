"""Samplers of interpolants: Euler's and Heun's methods for the ODE, and the SDE with a last step to its mean (SiT).

All start from noise at t = 0 and are loops of `jax.lax`. A denoiser is a callable (x_t, t (B,)) -> velocity.
"""

import jax
import jax.numpy as jnp

from gspn_jax.diffusion.interpolants import Denoiser, Interpolant
from gspn_jax.diffusion.noise import SampleNoise
from gspn_jax.diffusion.samplers import Progress, loop

DIFFUSIONS = ("sigma", "path")


def euler(denoiser: Denoiser, start: jax.Array, num_steps: int, *, progress: Progress | None = None) -> jax.Array:
    """The ODE dx/dt = velocity in equal steps of Euler's method, a call of the denoiser each. start: (B, ...) noise."""
    size = _step_size(num_steps)

    def step(carry: tuple[jax.Array], n: jax.Array) -> tuple[jax.Array]:
        (x,) = carry
        return (x + size * _told(denoiser, x, n.astype(x.dtype) * size),)

    return loop(step, (start,), num_steps, progress)[0]


def heun(denoiser: Denoiser, start: jax.Array, num_steps: int, *, progress: Progress | None = None) -> jax.Array:
    """The same by Heun's method: two calls each, an error of second order."""
    size = _step_size(num_steps)

    def step(carry: tuple[jax.Array], n: jax.Array) -> tuple[jax.Array]:
        (x,) = carry
        t = n.astype(x.dtype) * size
        slope = _told(denoiser, x, t)
        return (x + size / 2 * (slope + _told(denoiser, x + size * slope, t + size)),)

    return loop(step, (start,), num_steps, progress)[0]


def sde(
    denoiser: Denoiser,
    start: jax.Array,
    num_steps: int,
    noise: SampleNoise,
    *,
    interpolant: Interpolant,
    diffusion: str = "sigma",
    last_step: float = 0.04,
    progress: Progress | None = None,
) -> jax.Array:
    """dx = (velocity + w score) dt + sqrt(2 w) dW by Euler-Maruyama, and one step to the mean at the end.

    The score is singular at t = 1: the steps with noise end at 1 - last_step.

    Args:
      diffusion: w is "sigma", the share of noise, or that of the "path" (`Interpolant.diffusion`), which is singular at
        t = 0 and starts one step later.
    """
    if diffusion not in DIFFUSIONS:
        raise ValueError(f"diffusion: expected one of {', '.join(DIFFUSIONS)}; got {diffusion!r}")
    if not 0 < last_step < 1:
        raise ValueError(f"last_step: expected a number between 0 and 1, got {last_step}")
    if num_steps < 2:
        raise ValueError(f"num_steps: expected at least 2, got {num_steps}")
    first = 0.0 if diffusion == "sigma" else 1 / num_steps
    size = (1 - last_step - first) / (num_steps - 1)

    def drift(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        velocity = _told(denoiser, x, t)
        w = interpolant.coefficients(t, x).sigma if diffusion == "sigma" else interpolant.diffusion(t, x)
        return velocity + w * interpolant.score(velocity, x, t), w

    def step(carry: tuple[jax.Array], n: jax.Array) -> tuple[jax.Array]:
        (x,) = carry
        t = first + n.astype(x.dtype) * size
        change, w = drift(x, t)
        drawn = noise.draw(n + 1, x.shape[1:]).astype(x.dtype)
        moved = x + size * change + jnp.sqrt(2 * w * size) * drawn
        return (jnp.where(n < num_steps - 1, moved, x + last_step * change),)

    return loop(step, (start,), num_steps, progress)[0]


def _step_size(num_steps: int) -> float:
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    return 1 / num_steps


def _told(denoiser: Denoiser, x: jax.Array, t: jax.Array) -> jax.Array:
    return denoiser(x, jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])).astype(x.dtype)
