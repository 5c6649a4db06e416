"""Loads the networks that commands take as one file: the autoencoder of latents, the Inception-v3 of FID."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gspn_jax.evaluation.inception import Inception
from gspn_jax.models.autoencoder import Autoencoder
from gspn_jax.resuming import file_sha256
from gspn_jax.weights.diffusers import diffusers_autoencoder
from gspn_jax.weights.fid import fid_inception


def load_autoencoder(path: str, *, norm_groups: int = 32, dtype: str = "float32") -> tuple[Autoencoder, str]:
    """Returns an AutoencoderKL and the SHA-256 of its file.

    Args:
        path: safetensors file with the parameter names of diffusers, such as stabilityai/sd-vae-ft-ema.
        norm_groups: groups of its group norms.
        dtype: of the computation.

    Raises:
        ValueError: the file cannot be read, holds another network, or NaN or Inf; the message names the parameter.
    """

    def build(arrays: Mapping[str, Any]) -> Autoencoder:
        return diffusers_autoencoder(arrays, norm_groups=norm_groups, dtype=jnp.dtype(dtype))

    return _load(path, "autoencoder", build), file_sha256(path)


def load_inception(path: str) -> tuple[Inception, str]:
    """Returns the Inception-v3 of FID and the SHA-256 of its file.

    Args:
        path: safetensors file with the parameter names of pytorch-fid.

    Raises:
        ValueError: as `load_autoencoder`.
    """
    return _load(path, "inception", fid_inception), file_sha256(path)


def _load[Model: nnx.Module](path: str, argument: str, build: Callable[[Mapping[str, Any]], Model]) -> Model:
    arrays = _read(path, argument)
    try:
        wrong = [name for name, array in arrays.items() if not np.all(np.isfinite(np.asarray(array, np.float32)))]
        if wrong:
            raise ValueError(f"expected finite parameters, got NaN or Inf in {', '.join(sorted(wrong)[:3])}")
        return build(arrays)
    except ValueError as error:
        raise ValueError(f"{argument}: {path}: {error}") from error


def _read(path: str, argument: str) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{argument}: expected a safetensors file, got {path}: {error}") from error
