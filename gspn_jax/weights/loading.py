"""Networks that commands take as one file: the autoencoder of latents, the Inception-v3 of FID."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from gspn_jax.evaluation.inception import Inception
from gspn_jax.models.autoencoder import Autoencoder
from gspn_jax.resuming import file_sha256
from gspn_jax.weights import diffusers_autoencoder, fid_inception, local_file, read_arrays


def load_autoencoder(path: str, *, norm_groups: int = 32, dtype: str = "float32") -> tuple[Autoencoder, str]:
    """Returns an AutoencoderKL and the SHA-256 of its file.

    Args:
        path: a file for `read_arrays` with the parameter names of diffusers, such as stabilityai/sd-vae-ft-ema.
        norm_groups: groups of its group norms.
        dtype: of the computation.

    Raises:
        ValueError: the file cannot be read, holds another network, or NaN or Inf; the message names the parameter.
    """

    def build(arrays: Mapping[str, Any]) -> Autoencoder:
        return diffusers_autoencoder(arrays, norm_groups=norm_groups, dtype=jnp.dtype(dtype))

    return _load(path, "autoencoder", build)


def load_inception(path: str) -> tuple[Inception, str]:
    """Returns the Inception-v3 of FID and the SHA-256 of its file.

    Args:
        path: a file for `read_arrays` with the parameter names of pytorch-fid.

    Raises:
        ValueError: as `load_autoencoder`.
    """
    return _load(path, "inception", fid_inception)


def _load[Model: nnx.Module](
    path: str, argument: str, build: Callable[[Mapping[str, Any]], Model]
) -> tuple[Model, str]:
    arrays = read_arrays(path, argument=argument)
    try:
        return build(arrays), file_sha256(local_file(path, argument=argument))
    except ValueError as error:
        raise ValueError(f"{argument}: {path}: {error}") from error
