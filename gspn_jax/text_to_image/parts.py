"""The parts of a text-to-image model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gspn_jax.models.autoencoder import Autoencoder
from gspn_jax.models.unet import UNet
from gspn_jax.text import CLIPText, Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Networks, tokenizers and settings of a text-to-image model.

    Attributes:
        unet: the denoiser of latents.
        mixer: name of what its transformers have as self-attention, "" for a callable.
        mixer_options: how the mixers were built, as JSON values.
        text_encoders: one tower (Stable Diffusion 1.5), or two (SDXL).
        tokenizers: of each tower.
        autoencoder: of images.
        latent_scale: latents times this have about unit variance; the UNet denoises those.
        scheduler: the mapping of scheduler_config.json.
        zero_negative: whether guidance without a negative prompt leads away from zeros, not from the empty prompt.
        sample_size: side of the latents in training.
    """

    unet: UNet
    mixer: str
    mixer_options: Mapping[str, Any]
    text_encoders: tuple[CLIPText, ...]
    tokenizers: tuple[Tokenizer, ...]
    autoencoder: Autoencoder
    latent_scale: float
    scheduler: Mapping[str, Any]
    zero_negative: bool
    sample_size: int

    @property
    def default_guidance(self) -> float:
        """The scale of guidance that the models' authors use."""
        return 7.5 if len(self.text_encoders) == 1 else 5.0
