"""Parameters from elsewhere: files to arrays by name, arrays to our networks, files to workdirs."""

from gspn_jax.weights.autoencoder import diffusers_autoencoder
from gspn_jax.weights.clip import clip_text
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
from gspn_jax.weights.replacements import attention_replacement
from gspn_jax.weights.single_file import split_single_file
from gspn_jax.weights.unet import diffusers_unet, unet_replacements
from gspn_jax.weights.unet_config import diffusers_unet_sizes

__all__ = [
    "OBJECTIVES",
    "Converted",
    "attention_replacement",
    "clip_text",
    "convert",
    "diffusers_autoencoder",
    "diffusers_unet",
    "diffusers_unet_sizes",
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
    "split_single_file",
    "unet_replacements",
]
