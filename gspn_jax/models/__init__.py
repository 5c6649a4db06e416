"""Networks, one file each, and their builders by name."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from gspn_jax.mixers import GSPNMixer, SoftmaxAttention
from gspn_jax.models.classifier import Classifier
from gspn_jax.models.dit import DiT
from gspn_jax.models.generator import Generator
from gspn_jax.models.report import layer_report, parameter_count

__all__ = [
    "DITS",
    "GENERATORS",
    "MODELS",
    "Classifier",
    "DiT",
    "Generator",
    "build",
    "build_dit",
    "build_generator",
    "layer_report",
    "parameter_count",
]

# GSPN-T/S/B at 1,000 classes have 31,510,268 / 50,773,346 / 93,061,108 parameters. gspn_nano is for images of 8 to 32
# pixels: stem_stride 1 suits the smallest.
MODELS: dict[str, dict[str, Any]] = {
    "gspn_t": dict(widths=(96, 192, 384, 768), depths=(2, 2, 7, 2), proxy_rank=8, global_stages=(2, 3)),
    "gspn_s": dict(widths=(108, 216, 432, 864), depths=(5, 5, 10, 2), proxy_rank=16, global_stages=(3,)),
    "gspn_b": dict(widths=(120, 240, 480, 960), depths=(4, 4, 15, 4), proxy_rank=8, global_stages=(2, 3)),
    "gspn_nano": dict(widths=(32, 64, 128), depths=(1, 2, 2), proxy_rank=8, global_stages=(1, 2), stem_stride=2),
}

# GSPN-B/2, L/2 and XL/2 at 1,000 classes have 144,016,356 / 465,230,660 / 723,513,260 parameters. The number at the end
# of a name is the patch.
GENERATORS: dict[str, dict[str, Any]] = {
    "gspn_s2": dict(width=368, depth=24, patch=2),
    "gspn_s4": dict(width=368, depth=24, patch=4),
    "gspn_b2": dict(width=900, depth=30, patch=2),
    "gspn_b4": dict(width=900, depth=30, patch=4),
    "gspn_l2": dict(width=1200, depth=56, patch=2),
    "gspn_l4": dict(width=1200, depth=56, patch=4),
    "gspn_xl2": dict(width=1500, depth=56, patch=2),
    "gspn_xl4": dict(width=1500, depth=56, patch=4),
}

# DiT-S/2, B/2, L/2 and XL/2 (arXiv 2212.09748, table 1) at 1,000 classes: 33M, 130M, 458M and 675M parameters.
DITS: dict[str, dict[str, Any]] = {
    "dit_s2": dict(width=384, depth=12, num_heads=6, patch=2),
    "dit_b2": dict(width=768, depth=12, num_heads=12, patch=2),
    "dit_l2": dict(width=1024, depth=24, num_heads=16, patch=2),
    "dit_xl2": dict(width=1152, depth=28, num_heads=16, patch=2),
}


def build(name: str, *, num_classes: int, mixer: str = "gspn", rngs: nnx.Rngs, **options: Any) -> Classifier:
    """The classifier of a preset.

    Args:
      name: a key of `MODELS`.
      num_classes: outputs of the head.
      mixer: "gspn", or "attention" for softmax attention in the same skeleton.
      options: of `Classifier` or, with mixer "gspn", of `GSPNMixer`; they replace those of the preset.

    Raises:
      ValueError: an unknown name, mixer or option.
    """
    options = _merged(MODELS, name, options, _CLASSIFIER_OPTIONS)
    return Classifier(num_classes, mixer=_take_mixer(mixer, options), rngs=rngs, **options)


def build_generator(name: str, *, num_classes: int, mixer: str = "gspn", rngs: nnx.Rngs, **options: Any) -> Generator:
    """The generator of a preset.

    Args:
      name: a key of `GENERATORS`.
      num_classes: classes beside "no class".
      mixer: "gspn", or "attention" for softmax attention in the same skeleton.
      options: of `Generator` or, with mixer "gspn", of `GSPNMixer`, with "attention" `num_heads`; they replace those of
        the preset. By default proxy_rank is width // 16, and the last two blocks are global: what the authors' program
        means to do.

    Raises:
      ValueError: an unknown name, mixer or option.
    """
    options = _merged(GENERATORS, name, options, _GENERATOR_OPTIONS)
    options.setdefault("proxy_rank", max(options["width"] // 16, 1))
    options.setdefault("global_blocks", (options["depth"] - 1, options["depth"]))
    heads = options.pop("num_heads", None)
    if heads is not None and mixer != "attention":
        raise ValueError(f"num_heads: expected none with mixer {mixer!r}, got {heads}")
    build = _take_mixer(mixer, options)
    build = build if heads is None else functools.partial(build, num_heads=heads)
    return Generator(num_classes, mixer=build, rngs=rngs, **options)


def build_dit(name: str, *, num_classes: int, mixer: str = "attention", rngs: nnx.Rngs, **options: Any) -> DiT:
    """The diffusion transformer of a preset; SiT is the same network.

    Args:
      name: a key of `DITS`.
      num_classes: classes beside "no class".
      mixer: "attention", or "gspn" in the same skeleton.
      options: of `DiT`, `num_heads` or, with mixer "gspn", of `GSPNMixer`; they replace those of the preset.

    Raises:
      ValueError: an unknown name, mixer or option.
    """
    options = _merged(DITS, name, options, _DIT_OPTIONS)
    num_heads = options.pop("num_heads")
    if mixer == "gspn":
        options.setdefault("proxy_rank", max(options["width"] // 16, 1))
        return DiT(num_classes, mixer=_take_mixer(mixer, options), rngs=rngs, **options)
    attention = functools.partial(_take_mixer(mixer, options), num_heads=num_heads, use_bias=True)
    return DiT(num_classes, mixer=attention, rngs=rngs, **options)


_CLASSIFIER_OPTIONS = frozenset(
    "widths depths global_stages chunk stem_stride expansion mlp_ratio drop_path activation remat dtype".split()
)
_GENERATOR_OPTIONS = frozenset(
    "width depth num_heads patch in_channels chunk global_blocks drop_path remat dtype".split()
)
_DIT_OPTIONS = frozenset("width depth num_heads patch in_channels mlp_ratio remat dtype".split())
_MIXER_OPTIONS = frozenset(
    "proxy_rank weight_channels propagation_channels alignment implementation variant keep_states".split()
)


def _merged(
    presets: dict[str, dict[str, Any]], name: str, options: dict[str, Any], known: frozenset[str]
) -> dict[str, Any]:
    if name not in presets:
        raise ValueError(f"name: expected one of {', '.join(presets)}; got {name!r}")
    known = known | _MIXER_OPTIONS
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"{unknown[0]}: expected an option of the model ({', '.join(sorted(known))}), "
            f"got {unknown[0]}={options[unknown[0]]!r}"
        )
    return {**presets[name], **options}


def _take_mixer(mixer: str, options: dict[str, Any]) -> Callable[..., nnx.Module]:
    """The builder of a mixer, with its options, which leave `options`."""
    mixers = {"gspn": _gspn, "attention": _attention}
    if mixer not in mixers:
        raise ValueError(f"mixer: expected one of {', '.join(mixers)}; got {mixer!r}")
    return functools.partial(mixers[mixer], **{key: options.pop(key) for key in _MIXER_OPTIONS & set(options)})


def _gspn(features: int, **options: Any) -> nnx.Module:
    return GSPNMixer(features, **options)


def _attention(
    features: int, *, dtype, rngs: nnx.Rngs, num_heads: int | None = None, use_bias: bool = False, **gspn_options: Any
) -> nnx.Module:
    return SoftmaxAttention(features, num_heads=num_heads, use_bias=use_bias, dtype=dtype, rngs=rngs)
