"""GSPN in JAX and Flax: token mixers, models, data, training and evaluation.

    model = gspn_jax.create_model("gspn_t", num_classes=10, rngs=nnx.Rngs(0))
    logits = model(images)  # (B, H, W, 3) to (B, 10)
    gspn_jax.load_run("runs/digits").predict("image.png")

Notation: B batch, H rows, W columns, C channels; images and maps are channels-last.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gspn_jax.version import __version__

if TYPE_CHECKING:
    from gspn_jax.mixers import GSPNMixer, SoftmaxAttention
    from gspn_jax.models import create_model, list_models
    from gspn_jax.runs import load_run
    from gspn_jax.text_to_image import TextToImage

__all__ = ["GSPNMixer", "SoftmaxAttention", "TextToImage", "__version__", "create_model", "list_models", "load_run"]

_MODULES = {
    "GSPNMixer": "gspn_jax.mixers",
    "SoftmaxAttention": "gspn_jax.mixers",
    "create_model": "gspn_jax.models",
    "list_models": "gspn_jax.models",
    "load_run": "gspn_jax.runs",
    "TextToImage": "gspn_jax.text_to_image",
}


def __getattr__(name: str) -> Any:
    # On first use: the worker processes that read images import gspn_jax.data only, which needs no JAX.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
