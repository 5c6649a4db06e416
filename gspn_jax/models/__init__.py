"""Networks, one file each, and one registry of their presets.

To add a network, write its file, add a line to `NETWORKS` and its presets to `PRESETS`.
"""

from gspn_jax.models.classifier import Classifier
from gspn_jax.models.dit import DiT
from gspn_jax.models.generator import Generator
from gspn_jax.models.registry import NETWORKS, PRESETS, Preset, build_network, create_model, list_models
from gspn_jax.models.report import layer_report, parameter_count
from gspn_jax.models.unet import UNET_SIZES, UNet, unet_mixer

__all__ = [
    "NETWORKS",
    "PRESETS",
    "UNET_SIZES",
    "Classifier",
    "DiT",
    "Generator",
    "Preset",
    "UNet",
    "build_network",
    "create_model",
    "layer_report",
    "list_models",
    "parameter_count",
    "unet_mixer",
]
