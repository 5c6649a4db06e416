"""Data: sources of labelled images, augmentation, and deterministic batches, without models or JAX.

`gspn_jax.data.encoding`, which writes latents, uses JAX and is imported by its own name.
"""

from gspn_jax.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation
from gspn_jax.data.decoding import CorruptImage
from gspn_jax.data.pipeline import Batches, EvaluationBatches, evaluation_batches, training_batches
from gspn_jax.data.sources import SOURCES, load
from gspn_jax.data.sources.protocol import ArraySource, Dataset, EncodedSource, Latents, LatentSpace, Source

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SOURCES",
    "ArraySource",
    "Augmentation",
    "Batches",
    "CorruptImage",
    "Dataset",
    "EncodedSource",
    "EvaluationBatches",
    "LatentSpace",
    "Latents",
    "Source",
    "evaluation_batches",
    "load",
    "training_batches",
]
