"""Checkpoints: written in the background, verified when read; a damaged one gives way to the one before it."""

from gspn_jax.training.checkpoints.folder import CheckpointError, Checkpoints
from gspn_jax.training.checkpoints.parameters import load_both, load_parameters, save_parameters

__all__ = ["CheckpointError", "Checkpoints", "load_both", "load_parameters", "save_parameters"]
