"""Parameters from elsewhere: files to arrays by name, arrays to our networks, files to workdirs."""

from gspn_jax.weights.autoencoder import diffusers_autoencoder
from gspn_jax.weights.conversion import OBJECTIVES, Converted, convert
from gspn_jax.weights.dit import facebook_dit, facebook_dit_sizes
from gspn_jax.weights.files import local_file, read_arrays
from gspn_jax.weights.gspn import (
    nvlabs_classifier,
    nvlabs_classifier_arrays,
    nvlabs_classifier_sizes,
    nvlabs_generator,
    nvlabs_generator_sizes,
)
from gspn_jax.weights.inception import fid_inception

__all__ = [
    "OBJECTIVES",
    "Converted",
    "convert",
    "diffusers_autoencoder",
    "facebook_dit",
    "facebook_dit_sizes",
    "fid_inception",
    "local_file",
    "nvlabs_classifier",
    "nvlabs_classifier_arrays",
    "nvlabs_classifier_sizes",
    "nvlabs_generator",
    "nvlabs_generator_sizes",
    "read_arrays",
]
