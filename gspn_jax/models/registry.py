"""Models by name: which network a preset is, its sizes, and its mixer."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers import MIXERS, MixerBuilder, call_parameters, mixer_builder, mixer_options
from gspn_jax.models.classifier import Classifier
from gspn_jax.models.dit import DiT
from gspn_jax.models.generator import Generator

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and what it gives its mixers.

    Attributes:
        build: the module's class.
        mixer: the mixer by default.
        mixer_defaults: width -> options by the mixer's name, for networks whose mixers depend on their width.
    """

    build: Callable[..., nnx.Module]
    mixer: str
    mixer_defaults: Callable[[int], Mapping[str, Mapping[str, Any]]] = lambda width: {}

    @property
    def options(self) -> list[str]:
        """Names of the options that the network itself takes."""
        return [name for name in call_parameters(self.build) if name not in _GIVEN]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model of the papers.

    Attributes:
        network: a key of `NETWORKS`.
        options: of the network.
        mixer_options: of its default mixer.
    """

    network: str
    options: Mapping[str, Any]
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_GIVEN = ("num_classes", "mixer", "rngs")


_BIAS = {"attention": {"use_bias": True}}


def _proxy(width: int) -> dict[str, dict[str, Any]]:
    return {"gspn": {"proxy_rank": max(width // 16, 1)}}


NETWORKS = {
    "classifier": Network(Classifier, mixer="gspn"),
    "generator": Network(Generator, mixer="gspn", mixer_defaults=_proxy),
    "dit": Network(DiT, mixer="attention", mixer_defaults=lambda width: _proxy(width) | _BIAS),
}


def _classifier(widths: tuple[int, ...], depths: tuple[int, ...], rank: int, stages: tuple[int, ...], stride: int = 4):
    options = dict(widths=widths, depths=depths, global_stages=stages, stem_stride=stride)
    return Preset("classifier", options, {"proxy_rank": rank})


def _generator(width: int, depth: int, patch: int) -> Preset:
    return Preset("generator", dict(width=width, depth=depth, patch=patch))


def _dit(width: int, depth: int, num_heads: int) -> Preset:
    return Preset("dit", dict(width=width, depth=depth, patch=2), {"num_heads": num_heads})


PRESETS = {
    # GSPN-T/S/B at 1,000 classes have 31,510,268 / 50,773,346 / 93,061,108 parameters. gspn_nano is for images of 8 to
    # 32 pixels; stem_stride 1 suits the smallest.
    "gspn_t": _classifier((96, 192, 384, 768), (2, 2, 7, 2), 8, (2, 3)),
    "gspn_s": _classifier((108, 216, 432, 864), (5, 5, 10, 2), 16, (3,)),
    "gspn_b": _classifier((120, 240, 480, 960), (4, 4, 15, 4), 8, (2, 3)),
    "gspn_nano": _classifier((32, 64, 128), (1, 2, 2), 8, (1, 2), stride=2),
    # GSPN-B/2, L/2 and XL/2 at 1,000 classes have 144,016,356 / 465,230,660 / 723,513,260 parameters. The number at the
    # end of a name is the patch.
    "gspn_s2": _generator(368, 24, 2),
    "gspn_s4": _generator(368, 24, 4),
    "gspn_b2": _generator(900, 30, 2),
    "gspn_b4": _generator(900, 30, 4),
    "gspn_l2": _generator(1200, 56, 2),
    "gspn_l4": _generator(1200, 56, 4),
    "gspn_xl2": _generator(1500, 56, 2),
    "gspn_xl4": _generator(1500, 56, 4),
    # DiT-S/2, B/2, L/2 and XL/2 (arXiv 2212.09748, table 1) at 1,000 classes: 33M, 130M, 458M and 675M parameters.
    "dit_s2": _dit(384, 12, 6),
    "dit_b2": _dit(768, 12, 12),
    "dit_l2": _dit(1024, 24, 16),
    "dit_xl2": _dit(1152, 28, 16),
}


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of the presets that match a shell pattern, such as "gspn_*"."""
    return fnmatch.filter(PRESETS, pattern)


def create_model(
    name: str, *, num_classes: int, rngs: nnx.Rngs, mixer: str | MixerBuilder | None = None, **options: Any
) -> Any:
    """Builds the model of a preset, with fresh parameters.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of a classifier's head, or the classes of a generator beside "no class".
        rngs: source of the initial parameters.
        mixer: a name in `gspn_jax.mixers.MIXERS`, or a callable that builds a module on (B, H, W, C) maps; None for
            the preset's own.
        options: of the network (`Classifier`, `Generator`, `DiT`) or of the mixer (such as `GSPNMixer`). They replace
            those of the preset. `dtype` may be a name.

    Returns:
        The module: a `Classifier`, `Generator` or `DiT`.

    Raises:
        ValueError: an unknown name, an option that nothing takes (the nearest names are given), or a bad value.
    """
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join(PRESETS)}; got {name!r}{_nearest(name, PRESETS)}")
    preset = PRESETS[name]
    is_own = mixer is None or _mixer_name(mixer) == NETWORKS[preset.network].mixer
    defaults = preset.mixer_options if is_own else {}
    return build_network(
        preset.network, num_classes=num_classes, rngs=rngs, mixer=mixer, **{**preset.options, **defaults, **options}
    )


def build_network(
    network: str, *, num_classes: int, rngs: nnx.Rngs, mixer: str | MixerBuilder | None = None, **options: Any
) -> Any:
    """Builds a network whose sizes are all given as options; otherwise as `create_model`.

    Args:
        network: a key of `NETWORKS`.
    """
    if network not in NETWORKS:
        raise ValueError(f"network: expected one of {', '.join(NETWORKS)}; got {network!r}")
    found = NETWORKS[network]
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected an integer of at least 1, got {num_classes!r}")
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs: expected a flax.nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}")
    mixer = found.mixer if mixer is None else mixer
    of_mixer, takes_any = mixer_options(mixer)
    known = {*found.options, *of_mixer}
    for option, value in options.items():
        if option not in known and not takes_any:
            raise ValueError(
                f"{option}: expected an option of {network} or its mixer ({', '.join(sorted(known))}), "
                f"got {option}={value!r}{_nearest(option, known)}"
            )
    if "dtype" in options:
        options["dtype"] = checked_dtype(options["dtype"])
    for_network = {key: value for key, value in options.items() if key in found.options}
    given = {key: value for key, value in options.items() if key not in found.options}
    defaults = found.mixer_defaults(options["width"]) if "width" in options else {}
    chosen = {**defaults.get(_mixer_name(mixer), {}), **given}
    try:
        return found.build(num_classes, mixer=mixer_builder(mixer, chosen), rngs=rngs, **for_network)
    except TypeError as error:
        missing = [
            name
            for name, parameter in call_parameters(found.build).items()
            if parameter.default is parameter.empty and name not in (*_GIVEN, *for_network)
        ]
        if not missing:
            raise
        raise ValueError(f"{missing[0]}: expected a value, since {network} has no default; got none") from error


def _mixer_name(mixer: str | MixerBuilder) -> str:
    return mixer if isinstance(mixer, str) else next((name for name, known in MIXERS.items() if known is mixer), "")


def checked_dtype(value: Any, name: str = "dtype") -> jnp.dtype:
    """Returns the dtype of a computation; ValueError for one that is not among `DTYPES`."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}; got {value!r}")
    return dtype


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
