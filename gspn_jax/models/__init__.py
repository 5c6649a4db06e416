"""Networks, one file each, and their builders by name."""

import functools
from typing import Any

from flax import nnx

from gspn_jax.mixers import GSPNMixer, SoftmaxAttention
from gspn_jax.models.classifier import Classifier
from gspn_jax.models.report import layer_report, parameter_count

__all__ = ["MODELS", "Classifier", "build", "layer_report", "parameter_count"]

# GSPN-T/S/B at 1,000 classes have 31,510,268 / 50,773,346 / 93,061,108 parameters. gspn_nano is for images of 8 to 32
# pixels: stem_stride 1 suits the smallest.
MODELS: dict[str, dict[str, Any]] = {
    "gspn_t": dict(widths=(96, 192, 384, 768), depths=(2, 2, 7, 2), proxy_rank=8, global_stages=(2, 3)),
    "gspn_s": dict(widths=(108, 216, 432, 864), depths=(5, 5, 10, 2), proxy_rank=16, global_stages=(3,)),
    "gspn_b": dict(widths=(120, 240, 480, 960), depths=(4, 4, 15, 4), proxy_rank=8, global_stages=(2, 3)),
    "gspn_nano": dict(widths=(32, 64, 128), depths=(1, 2, 2), proxy_rank=8, global_stages=(1, 2), stem_stride=2),
}


def build(name: str, *, num_classes: int, mixer: str = "gspn", rngs: nnx.Rngs, **options: Any) -> Classifier:
    """The network of a preset.

    Args:
      name: a key of `MODELS`.
      num_classes: outputs of the head.
      mixer: "gspn", or "attention" for softmax attention in the same skeleton.
      options: of `Classifier` or, with mixer "gspn", of `GSPNMixer`; they replace those of the preset.

    Raises:
      ValueError: an unknown name, mixer or option.
    """
    if name not in MODELS:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}; got {name!r}")
    mixers = {"gspn": _gspn, "attention": _attention}
    if mixer not in mixers:
        raise ValueError(f"mixer: expected one of {', '.join(mixers)}; got {mixer!r}")
    unknown = sorted(set(options) - _CLASSIFIER_OPTIONS - _MIXER_OPTIONS)
    if unknown:
        known = ", ".join(sorted(_CLASSIFIER_OPTIONS | _MIXER_OPTIONS))
        raise ValueError(
            f"{unknown[0]}: expected an option of the model ({known}), got {unknown[0]}={options[unknown[0]]!r}"
        )
    options = {**MODELS[name], **options}
    mixer_options = {key: options.pop(key) for key in _MIXER_OPTIONS & set(options)}
    return Classifier(num_classes, mixer=functools.partial(mixers[mixer], **mixer_options), rngs=rngs, **options)


_CLASSIFIER_OPTIONS = frozenset(
    "widths depths global_stages chunk stem_stride expansion mlp_ratio drop_path activation remat dtype".split()
)
_MIXER_OPTIONS = frozenset("proxy_rank weight_channels propagation_channels alignment implementation".split())


def _gspn(features: int, **options: Any) -> nnx.Module:
    return GSPNMixer(features, **options)


def _attention(features: int, *, dtype, rngs: nnx.Rngs, **gspn_options: Any) -> nnx.Module:
    return SoftmaxAttention(features, dtype=dtype, rngs=rngs)
