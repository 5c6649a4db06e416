"""Parameters from elsewhere: one file a source, arrays as a mapping of names, whatever file held them."""

from gspn_jax.weights.diffusers import diffusers_autoencoder
from gspn_jax.weights.facebook import facebook_dit, facebook_dit_sizes
from gspn_jax.weights.fid import fid_inception
from gspn_jax.weights.nvlabs import (
    nvlabs_classifier,
    nvlabs_classifier_arrays,
    nvlabs_classifier_sizes,
    nvlabs_generator,
    nvlabs_generator_sizes,
)

__all__ = [
    "diffusers_autoencoder",
    "facebook_dit",
    "facebook_dit_sizes",
    "fid_inception",
    "nvlabs_classifier",
    "nvlabs_classifier_arrays",
    "nvlabs_classifier_sizes",
    "nvlabs_generator",
    "nvlabs_generator_sizes",
]
