"""Text-to-image models: a pipeline of text towers, UNet, sampler and autoencoder, and where its parts come from."""

from gspn_jax.text_to_image.loading import convert
from gspn_jax.text_to_image.pipeline import SAMPLERS, TextToImage
from gspn_jax.text_to_image.published import is_published

__all__ = ["SAMPLERS", "TextToImage", "convert", "is_published"]
