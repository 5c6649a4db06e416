"""Parameters from elsewhere: one file a source, arrays as a mapping of names, whatever file held them."""

from gspn_jax.weights.nvlabs import (
    nvlabs_classifier,
    nvlabs_classifier_arrays,
    nvlabs_classifier_sizes,
    nvlabs_generator,
    nvlabs_generator_sizes,
)

__all__ = [
    "nvlabs_classifier",
    "nvlabs_classifier_arrays",
    "nvlabs_classifier_sizes",
    "nvlabs_generator",
    "nvlabs_generator_sizes",
]
