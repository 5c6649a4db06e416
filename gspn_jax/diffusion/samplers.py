"""Samplers for Gaussian diffusion: ancestral DDPM, DDIM, Euler and DPM-Solver++(2M).

All take a denoiser, noise and the steps to visit, and are `jax.lax` loops, so they can be jitted. A denoiser is a
callable (x_t (B, ..., C), timestep (B,)) that returns the predicted noise, (B, ..., C), or (B, ..., 2 C) with variance
channels, which only ancestral sampling uses. Samplers compute in the dtype of their starting noise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gspn_jax.diffusion.gaussian import Denoiser, GaussianDiffusion, split_output
from gspn_jax.diffusion.noise import SampleNoise

Progress = Callable[[], object]  # called after each step


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The steps that a sampler visits, from noise to data.

    Attributes:
        timesteps: (n,) integers, the denoiser's timestep input.
        alphas_bar: (n + 1,) float64, the data's share of the variance at each step and at the end of the last one.
    """

    timesteps: np.ndarray
    alphas_bar: np.ndarray


SPACINGS = ("ends", "leading", "trailing", "linspace")


def steps(process: GaussianDiffusion, count: int, spacing: str = "ends", *, final_alpha_bar: float = 1.0) -> Steps:
    """Selects `count` steps of a process.

    Args:
        process: T steps.
        count: number of steps, 1 to T.
        spacing: "ends": evenly spaced, with the first and the last step, as in DiT; "leading": multiples of T // count
            plus 1, as in Stable Diffusion's samplers; "trailing": every T / count steps downwards from the last step;
            "linspace": evenly spaced from the last step to the first, without the first.
        final_alpha_bar: abar at the end of the last step; 1 is data without noise.

    Raises:
        ValueError: an unknown spacing, or a count out of range.
    """
    last = process.num_steps - 1
    if not 1 <= count <= process.num_steps:
        raise ValueError(f"count: expected 1 to {process.num_steps} steps, got {count}")
    if spacing == "ends":
        kept = np.round(np.arange(count) * (last / max(count - 1, 1))) if count > 1 else np.array([last])
    elif spacing == "leading":
        kept = np.minimum(np.arange(count) * (process.num_steps // count) + 1, last)
    elif spacing == "trailing":
        kept = np.round(np.arange(1, count + 1) * (process.num_steps / count)) - 1
    elif spacing == "linspace":
        kept = np.round(np.linspace(0, last, count + 1))[1:]
    else:
        raise ValueError(f"spacing: expected one of {', '.join(SPACINGS)}; got {spacing!r}")
    kept = kept.astype(int)[::-1]
    return Steps(process.timesteps[kept], np.append(process.alphas_bar[kept], final_alpha_bar))


def ddpm(
    denoiser: Denoiser,
    start: jax.Array,
    process: GaussianDiffusion,
    noise: SampleNoise,
    *,
    clip: float | None = None,
    progress: Progress | None = None,
) -> jax.Array:
    """Samples by ancestral sampling at every step of a process (DDPM, arXiv 2006.11239, algorithm 2).

    Args:
        denoiser: predicts the noise, with or without variance channels.
        start: standard normal noise, (B, ..., C).
        process: all its steps are visited; use `GaussianDiffusion.respaced` for fewer steps.
        noise: draws the noise of each step.
        clip: bound of the absolute value of the predicted x_0; None leaves it as it is.
        progress: called on the host after each step.

    Returns:
        Data, (B, ..., C), in the dtype of `start`.
    """

    def step(x: jax.Array, index: jax.Array) -> jax.Array:
        output = _told(denoiser, x, jnp.asarray(process.timesteps)[index])
        found = process.predicted(output, x, index, clip=clip)
        drawn = noise.draw(process.num_steps - index, x.shape[1:]).astype(x.dtype)
        return found.mean + jnp.where(index > 0, jnp.exp(found.log_variance / 2) * drawn, 0)

    return loop(lambda x, n: (step(x[0], process.num_steps - 1 - n),), (start,), process.num_steps, progress)[0]


def ddim(
    denoiser: Denoiser,
    start: jax.Array,
    visited: Steps,
    *,
    eta: float = 0.0,
    noise: SampleNoise | None = None,
    clip: float | None = None,
    progress: Progress | None = None,
) -> jax.Array:
    """Samples by DDIM (arXiv 2010.02502, equation 12).

    Args:
        denoiser: predicts the noise.
        start: standard normal noise, (B, ..., C).
        visited: see `steps`.
        eta: share of the noise that DDPM draws at each step; 0 is deterministic.
        noise: draws the noise of each step; required if eta is not 0.
        clip: bound of the absolute value of the predicted x_0; None leaves it as it is.
        progress: called on the host after each step.

    Returns:
        Data, (B, ..., C), in the dtype of `start`.

    Raises:
        ValueError: eta is not 0 and noise is None.
    """
    if eta and noise is None:
        raise ValueError(f"noise: expected a SampleNoise, since eta is {eta}, got None")
    before, after = visited.alphas_bar[:-1], visited.alphas_bar[1:]
    spread = eta * np.sqrt((1 - after) / (1 - before) * (1 - before / after))
    tables = _tables(
        start, timestep=visited.timesteps, signal=np.sqrt(before), noise=np.sqrt(1 - before),
        next_signal=np.sqrt(after), next_noise=np.sqrt(np.maximum(1 - after - spread**2, 0)), spread=spread,
    )  # fmt: skip

    def step(carry: Any, n: jax.Array) -> Any:
        (x,), at = carry, _row(tables, n)
        predicted = _prediction(denoiser, x, at["timestep"])
        x_start = (x - at["noise"] * predicted) / at["signal"]
        if clip is not None:
            x_start = jnp.clip(x_start, -clip, clip)
            predicted = (x - at["signal"] * x_start) / at["noise"]
        x = at["next_signal"] * x_start + at["next_noise"] * predicted
        if eta and noise is not None:
            x += at["spread"] * noise.draw(n + 1, x.shape[1:]).astype(x.dtype)
        return (x,)

    return loop(step, (start,), len(visited.timesteps), progress)[0]


def euler(denoiser: Denoiser, start: jax.Array, visited: Steps, *, progress: Progress | None = None) -> jax.Array:
    """Samples by Euler's method in sigma = sqrt(1 / abar - 1), the noise-to-data ratio (arXiv 2206.00364, algorithm 1).

    Args:
        denoiser: predicts the noise.
        start: standard normal noise, (B, ..., C).
        visited: see `steps`.
        progress: called on the host after each step.

    Returns:
        Data, (B, ..., C), in the dtype of `start`.
    """
    sigmas = np.sqrt(1 / visited.alphas_bar - 1)
    tables = _tables(start, timestep=visited.timesteps, scale=1 / np.sqrt(sigmas[:-1] ** 2 + 1), change=np.diff(sigmas))

    def step(carry: Any, n: jax.Array) -> Any:
        (x,), at = carry, _row(tables, n)
        return (x + at["change"] * _prediction(denoiser, x * at["scale"], at["timestep"]),)

    ended = loop(step, (start * float(np.sqrt(sigmas[0] ** 2 + 1)),), len(visited.timesteps), progress)[0]
    return ended / float(np.sqrt(sigmas[-1] ** 2 + 1))


def dpm_solver(denoiser: Denoiser, start: jax.Array, visited: Steps, *, progress: Progress | None = None) -> jax.Array:
    """Samples by DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); the first and the last step are first-order.

    Arguments and result are those of `euler`.
    """
    signal, noise = np.sqrt(visited.alphas_bar), np.sqrt(1 - visited.alphas_bar)
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(signal) - np.log(noise)
    h = np.diff(half_log_snr)
    # D = x_0 + (x_0 - the x_0 before) * h / (2 * the h before).
    correction = np.append(0.0, h[1:] / (2 * h[:-1]))
    correction[-1] = 0
    tables = _tables(
        start, timestep=visited.timesteps, signal=signal[:-1], noise=noise[:-1], kept=noise[1:] / noise[:-1],
        gained=signal[1:] * -np.expm1(-h), correction=correction,
    )  # fmt: skip

    def step(carry: Any, n: jax.Array) -> Any:
        (x, x_start_before), at = carry, _row(tables, n)
        x_start = (x - at["noise"] * _prediction(denoiser, x, at["timestep"])) / at["signal"]
        corrected = x_start + at["correction"] * (x_start - x_start_before)
        return at["kept"] * x + at["gained"] * corrected, x_start

    return loop(step, (start, jnp.zeros_like(start)), len(visited.timesteps), progress)[0]


def loop(step: Callable[[Any, jax.Array], Any], carry: Any, count: int, progress: Progress | None) -> Any:
    """Returns carry after carry = step(carry, n) for n = 0 .. count - 1; calls `progress` on the host after each."""

    def body(n: jax.Array, carry: Any) -> Any:
        carry = step(carry, n)
        if progress is not None:
            jax.debug.callback(lambda _, progress=progress: progress(), n)
        return carry

    return jax.lax.fori_loop(0, count, body, carry)


def _tables(like: jax.Array, *, timestep: np.ndarray, **values: np.ndarray) -> dict[str, jax.Array]:
    """Returns (n,) arrays by name, one entry a step; all but `timestep` are in the dtype of `like`."""
    return {"timestep": jnp.asarray(timestep)} | {name: jnp.asarray(v, like.dtype) for name, v in values.items()}


def _row(tables: dict[str, jax.Array], n: jax.Array) -> dict[str, jax.Array]:
    """Returns the entries of step n, each ()."""
    return {name: table[n] for name, table in tables.items()}


def _told(denoiser: Denoiser, x: jax.Array, timestep: jax.Array) -> jax.Array:
    """Returns the denoiser's output, in x's dtype, at one timestep () for the whole batch."""
    return denoiser(x, jnp.broadcast_to(timestep, x.shape[:1])).astype(x.dtype)


def _prediction(denoiser: Denoiser, x: jax.Array, timestep: jax.Array) -> jax.Array:
    """Returns the predicted noise, (B, ..., C), without variance channels."""
    return split_output(_told(denoiser, x, timestep), x.shape[-1])[0]
