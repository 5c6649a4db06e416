"""Diffusion processes, samplers and guidance. A denoiser is any callable on arrays (B, ..., C), channels last."""

from gspn_jax.diffusion import interpolant_samplers, samplers, schedulers
from gspn_jax.diffusion.gaussian import GaussianDiffusion
from gspn_jax.diffusion.guidance import guided
from gspn_jax.diffusion.interpolants import Interpolant
from gspn_jax.diffusion.noise import SampleNoise

__all__ = [
    "GaussianDiffusion",
    "Interpolant",
    "SampleNoise",
    "guided",
    "interpolant_samplers",
    "samplers",
    "schedulers",
]
