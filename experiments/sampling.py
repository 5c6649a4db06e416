"""How samples are drawn: samplers by name, with guidance, of the objective that a network was trained on."""

import dataclasses
import functools
import math
from typing import Any

import jax

from gspn_jax.diffusion import Interpolant, SampleNoise, guided, interpolant_samplers, samplers
from gspn_jax.training.generation import Generation
from gspn_jax.training.state import Parameters

NOISE_SAMPLERS = ("ddpm", "ddim", "euler", "dpm_solver")  # of objective "ddpm"
VELOCITY_SAMPLERS = ("heun", "euler", "sde")  # of interpolants


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Attributes:
    sampler: "" for "ddpm", or of interpolants "heun".
    num_steps: 0 for 250, or 25 of Heun's method.
    guidance: scale of classifier-free guidance; 1 for none.
    interval: times, as the network is told them, between which guidance acts; None for always.
    guided_channels: how many of the first channels are guided; None for all.
    seed: of the noise.
    """

    sampler: str = ""
    num_steps: int = 0
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    guided_channels: int | None = None
    seed: int = 0

    def of(self, task: Generation) -> "Sampling":
        """What it comes to for a task. ValueError for a sampler that the objective has not, or numbers out of range."""
        is_velocity = isinstance(task.objective, Interpolant)
        known = VELOCITY_SAMPLERS if is_velocity else NOISE_SAMPLERS
        sampler = self.sampler or known[0]
        if sampler not in known:
            raise ValueError(f"sampler: expected one of {', '.join(known)}; got {sampler!r}")
        num_steps = self.num_steps or (25 if sampler == "heun" else 250)
        least = 2 if sampler == "ddpm" else 1
        most = math.inf if isinstance(task.objective, Interpolant) else task.objective.num_steps
        if not least <= num_steps <= most:
            raise ValueError(f"steps: expected {least} to {most}, or 0 for the sampler's own, got {num_steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: expected a finite number, got {self.guidance}")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval: expected a smaller and a larger time, got {self.interval}")
        if self.guided_channels is not None and self.guided_channels < 1:
            raise ValueError(f"guided_channels: expected at least 1, got {self.guided_channels}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: expected 0 to 2**31 - 1, got {self.seed}")
        return dataclasses.replace(self, sampler=sampler, num_steps=num_steps)


def draw(
    task: Generation,
    params: Parameters,
    labels: jax.Array,
    samples: jax.Array,
    sampling: Sampling,
    *,
    shape: tuple[int, ...],
    clip: float | None = None,
    progress: samplers.Progress | None = None,
) -> jax.Array:
    """Draws samples with these labels and numbers, (B,) each: (B, *shape) float32, on the network's scale. Traceable.

    Args:
        clip: bound of what ancestral sampling and DDIM believe of the data.
    """
    how, noise = sampling.of(task), SampleNoise(sampling.seed, samples)
    denoiser = guided(
        functools.partial(task.denoise, params), labels, scale=how.guidance, no_class=task.num_classes,
        interval=how.interval, channels=how.guided_channels,
    )  # fmt: skip
    start = noise.draw(0, shape)
    if isinstance(task.objective, Interpolant):
        if how.sampler == "sde":
            options: Any = dict(interpolant=task.objective, progress=progress)
            return interpolant_samplers.sde(denoiser, start, how.num_steps, noise, **options)
        run = interpolant_samplers.heun if how.sampler == "heun" else interpolant_samplers.euler
        return run(denoiser, start, how.num_steps, progress=progress)
    if how.sampler == "ddpm":
        process = task.objective.respaced(how.num_steps)
        return samplers.ddpm(denoiser, start, process, noise, clip=clip, progress=progress)
    visited = samplers.steps(task.objective, how.num_steps)
    if how.sampler == "ddim":
        return samplers.ddim(denoiser, start, visited, clip=clip, progress=progress)
    run = samplers.euler if how.sampler == "euler" else samplers.dpm_solver
    return run(denoiser, start, visited, progress=progress)
