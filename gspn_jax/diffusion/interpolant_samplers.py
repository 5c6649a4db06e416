"""Samplers for interpolants (SiT, arXiv 2401.08740): Euler and Heun for the ODE, Euler-Maruyama for the SDE.

All start from noise at t = 0 and are `jax.lax` loops, so they can be jitted. A denoiser is a callable
(x_t (B, ..., C), t (B,)) -> velocity (B, ..., C).
"""

import jax
import jax.numpy as jnp

from gspn_jax.diffusion.interpolants import Denoiser, Interpolant
from gspn_jax.diffusion.noise import SampleNoise
from gspn_jax.diffusion.samplers import Progress, loop

DIFFUSIONS = ("sigma", "path")


def euler(denoiser: Denoiser, start: jax.Array, num_steps: int, *, progress: Progress | None = None) -> jax.Array:
    """Solves dx/dt = velocity from t = 0 to 1 by Euler's method.

    Args:
        denoiser: called once a step.
        start: standard normal noise, (B, ..., C).
        num_steps: number of equal steps, at least 1.
        progress: called on the host after each step.

    Returns:
        Data, (B, ..., C), in the dtype of `start`.

    Raises:
        ValueError: num_steps is less than 1.
    """
    size = _step_size(num_steps)

    def step(carry: tuple[jax.Array], n: jax.Array) -> tuple[jax.Array]:
        (x,) = carry
        return (x + size * _told(denoiser, x, n.astype(x.dtype) * size),)

    return loop(step, (start,), num_steps, progress)[0]


def heun(denoiser: Denoiser, start: jax.Array, num_steps: int, *, progress: Progress | None = None) -> jax.Array:
    """Solves the ODE of `euler` by Heun's second-order method, which calls the denoiser twice a step.

    Arguments, result and errors are those of `euler`.
    """
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
    """Solves dx = (velocity + w score) dt + sqrt(2 w) dW by Euler-Maruyama, with a noise-free last step to the mean.

    The score is singular at t = 1, so the noisy steps end at t = 1 - last_step.

    Args:
        denoiser: called once a step.
        start: standard normal noise, (B, ..., C).
        num_steps: number of steps, the last one included; at least 2.
        noise: draws the noise of each step.
        interpolant: the process that the denoiser was trained on.
        diffusion: "sigma" sets w to sigma_t; "path" sets it to `Interpolant.diffusion`, which is singular at t = 0, so
            the first step starts at t = 1 / num_steps.
        last_step: length of the last step, in (0, 1).
        progress: called on the host after each step.

    Returns:
        Data, (B, ..., C), in the dtype of `start`.

    Raises:
        ValueError: an unknown `diffusion`, or a number out of range.
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
    """Returns 1 / num_steps; ValueError if num_steps is less than 1."""
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    return 1 / num_steps


def _told(denoiser: Denoiser, x: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the denoiser's output, in x's dtype, at one time t () for the whole batch."""
    return denoiser(x, jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])).astype(x.dtype)
