"""Samplers for Gaussian diffusion: ancestral DDPM, DDIM, Euler, DPM-Solver++(2M), PNDM and DEIS.

All take a denoiser, noise and the steps to visit, and are `jax.lax` loops, so they can be jitted. A denoiser is a
callable (x_t (B, ..., C), timestep (B,)) that returns the predicted noise, (B, ..., C), or (B, ..., 2 C) with variance
channels, which only ancestral sampling uses. Where `Steps.velocity` is set, it returns the velocity in place of the
noise. Samplers compute in the dtype of their starting noise.
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
        timesteps: (n,) integers or floats, the denoiser's timestep input.
        alphas_bar: (n + 1,) float64, the data's share of the variance at each step and at the end of the last one.
        velocity: the denoiser returns the velocity v = sqrt(abar) noise - sqrt(1 - abar) x_0 (arXiv 2202.00512,
            appendix D) in place of the noise. `ddpm` visits no `Steps` and takes the noise only.
        first_order_end: the last step of `dpm_solver` and `deis` is first-order, as it must be if it ends at abar 1.
    """

    timesteps: np.ndarray
    alphas_bar: np.ndarray
    velocity: bool = False
    first_order_end: bool = True


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
    next_noise = np.sqrt(np.maximum(1 - after - spread**2, 0))
    tables = _tables(start, visited, next_signal=np.sqrt(after), next_noise=next_noise, spread=spread)

    def step(carry: Any, n: jax.Array) -> Any:
        (x,), at = carry, _row(tables, n)
        predicted = _predicted_noise(denoiser, x, at, visited)
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
    scale = 1 / np.sqrt(visited.alphas_bar)  # sqrt(sigma^2 + 1)
    return exploding_euler(denoiser, start * float(scale[0]), visited, progress=progress) / float(scale[-1])


def exploding_euler(
    denoiser: Denoiser, start: jax.Array, visited: Steps, *, progress: Progress | None = None
) -> jax.Array:
    """Samples as `euler`, with start and result in the variance-exploding scale x_0 + sigma noise.

    The denoiser is still called with sqrt(abar) x_0 + sqrt(1 - abar) noise.
    """
    change = np.diff(np.sqrt(1 / visited.alphas_bar - 1))
    tables = _tables(start, visited, change=change)

    def step(carry: Any, n: jax.Array) -> Any:
        (x,), at = carry, _row(tables, n)
        return (x + at["change"] * _predicted_noise(denoiser, x * at["signal"], at, visited),)

    return loop(step, (start,), len(visited.timesteps), progress)[0]


def dpm_solver(denoiser: Denoiser, start: jax.Array, visited: Steps, *, progress: Progress | None = None) -> jax.Array:
    """Samples by DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2).

    The first step is first-order, and the last if `Steps.first_order_end` is set. Arguments and result are those of
    `euler`.
    """
    signal, noise = np.sqrt(visited.alphas_bar), np.sqrt(1 - visited.alphas_bar)
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(signal) - np.log(noise)
    h = np.diff(half_log_snr)
    # D = x_0 + (x_0 - the x_0 before) * h / (2 * the h before).
    correction = np.append(0.0, h[1:] / (2 * h[:-1]))
    if visited.first_order_end:
        correction[-1] = 0
    gained = signal[1:] * -np.expm1(-h)
    tables = _tables(start, visited, kept=noise[1:] / noise[:-1], gained=gained, correction=correction)

    def step(carry: Any, n: jax.Array) -> Any:
        (x, x_start_before), at = carry, _row(tables, n)
        x_start = (x - at["noise"] * _predicted_noise(denoiser, x, at, visited)) / at["signal"]
        corrected = x_start + at["correction"] * (x_start - x_start_before)
        return at["kept"] * x + at["gained"] * corrected, x_start

    return loop(step, (start, jnp.zeros_like(start)), len(visited.timesteps), progress)[0]


# Row k: weights of the newest and older predictions when k + 1 are known (Adams-Bashforth of order k + 1).
_ADAMS = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def pndm(denoiser: Denoiser, start: jax.Array, visited: Steps, *, progress: Progress | None = None) -> jax.Array:
    """Samples by the linear multistep method of PNDM (PLMS; arXiv 2202.09778, equations 9 and 12).

    A step is DDIM's with a combination of the last four predictions in place of the newest. If the second timestep
    occurs twice in a row, the second call only improves the first step: that step is made again, from `start`, with the
    average of both predictions, and the second one is then forgotten.

    Arguments and result are those of `euler`.
    """
    timesteps, change = visited.timesteps, np.diff(np.sqrt(1 / visited.alphas_bar - 1))
    repeats = len(timesteps) > 2 and bool(timesteps[1] == timesteps[2])
    weights = _ADAMS[np.clip(np.arange(len(timesteps)) - repeats, 0, 3)]
    if repeats:
        weights[1, :2], change[1] = 0.5, change[0]
    return _multistep(denoiser, start, visited, change[:, None] * weights, progress, repeats=repeats)


def deis(denoiser: Denoiser, start: jax.Array, visited: Steps, *, progress: Progress | None = None) -> jax.Array:
    """Samples by DEIS of order 2 (exponential Adams-Bashforth, arXiv 2204.13902).

    Between steps the noise is taken as linear in the logarithm of sigma = sqrt(1 / abar - 1). The first step is
    first-order, and the last if `Steps.first_order_end` is set. Arguments and result are those of `euler`.
    """
    sigma, count = np.sqrt(1 / visited.alphas_bar - 1), len(visited.timesteps)
    end = max(count - visited.first_order_end, 1)  # steps 1 .. end - 1 are second-order
    before, now, after = sigma[: end - 1], sigma[1:end], sigma[2 : end + 1]
    # At s the line through both noises gives the older one the weight log(s / now) / log(before / now). Its weight in
    # the step is the integral of that from now to after; the newer one has the rest.
    older = np.zeros(count)
    older[1:end] = (after * (np.log(after / now) - 1) + now) / np.log(before / now)
    return _multistep(denoiser, start, visited, np.stack([np.diff(sigma) - older, older], axis=1), progress)


def _multistep(
    denoiser: Denoiser,
    start: jax.Array,
    visited: Steps,
    weights: np.ndarray,
    progress: Progress | None,
    *,
    repeats: bool = False,
) -> jax.Array:
    """Returns data, (B, ..., C), by steps that add a weighted sum of the predicted noises to x / sqrt(abar).

    Args:
        weights: (n, k), a row for each step: weights of the newest prediction and of the k - 1 before it.
        repeats: step 1 makes step 0 again, from `start`, and its own prediction is forgotten.
    """
    signal = np.sqrt(visited.alphas_bar)
    next_signal, kept = signal[1:], signal[1:] / signal[:-1]
    if repeats:
        kept[1] = signal[2] / signal[0]
    tables = _tables(start, visited, kept=kept, weights=next_signal[:, None] * weights)

    def step(carry: Any, n: jax.Array) -> Any:
        (x, *past), at = carry, _row(tables, n)
        known = (_predicted_noise(denoiser, x, at, visited), *past)
        again = jnp.logical_and(repeats, n == 1)
        added = sum(at["weights"][age] * noise for age, noise in enumerate(known))
        past = [jnp.where(again, old, new) for old, new in zip(past, known[:-1], strict=True)]
        return at["kept"] * jnp.where(again, start, x) + added, *past

    nothing = jnp.zeros_like(start)
    return loop(step, (start, *[nothing] * (weights.shape[1] - 1)), len(visited.timesteps), progress)[0]


def loop(step: Callable[[Any, jax.Array], Any], carry: Any, count: int, progress: Progress | None) -> Any:
    """Returns carry after carry = step(carry, n) for n = 0 .. count - 1; calls `progress` on the host after each."""

    def body(n: jax.Array, carry: Any) -> Any:
        carry = step(carry, n)
        if progress is not None:
            jax.debug.callback(lambda _, progress=progress: progress(), n)
        return carry

    return jax.lax.fori_loop(0, count, body, carry)


def _tables(like: jax.Array, visited: Steps, **values: np.ndarray) -> dict[str, jax.Array]:
    """Returns arrays (n, ...) by name, one entry a step, all but the timesteps in the dtype of `like`.

    Beside `values` there are "timestep", "signal", sqrt(abar), and "noise", sqrt(1 - abar).
    """
    now = visited.alphas_bar[:-1]
    values |= {"signal": np.sqrt(now), "noise": np.sqrt(1 - now)}
    return {"timestep": jnp.asarray(visited.timesteps)} | {k: jnp.asarray(v, like.dtype) for k, v in values.items()}


def _row(tables: dict[str, jax.Array], n: jax.Array) -> dict[str, jax.Array]:
    """Returns the entries of step n, each (...)."""
    return {name: table[n] for name, table in tables.items()}


def _told(denoiser: Denoiser, x: jax.Array, timestep: jax.Array) -> jax.Array:
    """Returns the denoiser's output, in x's dtype, at one timestep () for the whole batch."""
    return denoiser(x, jnp.broadcast_to(timestep, x.shape[:1])).astype(x.dtype)


def _predicted_noise(denoiser: Denoiser, x: jax.Array, at: dict[str, jax.Array], visited: Steps) -> jax.Array:
    """Returns the predicted noise, (B, ..., C), without variance channels.

    Args:
        x: (B, ..., C) = sqrt(abar) x_0 + sqrt(1 - abar) noise.
        at: a row of `_tables`.
    """
    output = split_output(_told(denoiser, x, at["timestep"]), x.shape[-1])[0]
    return at["signal"] * output + at["noise"] * x if visited.velocity else output
