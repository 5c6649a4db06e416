"""Token mixers: modules on (B, H, W, C) maps, one file each, in one registry.

A mixer is built by `Mixer(features, dtype=..., rngs=..., **options)`. Its call takes a map (B, H, W, features) and
returns a map of the same shape. A mixer with a local form also takes `chunk`, the number of lines after which its
scans restart (None: global). To add a mixer, write its file and add a line to `MIXERS`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from gspn_jax.mixers.attention import SoftmaxAttention
from gspn_jax.mixers.gspn import GSPNMixer
from gspn_jax.mixers.linear_attention import LinFusionAttention
from gspn_jax.mixers.mamba import MambaMixer
from gspn_jax.mixers.mamba2 import Mamba2Mixer

__all__ = [
    "MIXERS",
    "GSPNMixer",
    "LinFusionAttention",
    "Mamba2Mixer",
    "MambaMixer",
    "MixerBuilder",
    "SoftmaxAttention",
    "call_parameters",
    "mixer_builder",
    "mixer_options",
]

# Called as builder(features, dtype=..., rngs=...); `chunk`, `num_heads` and `param_dtype` may be given too.
MixerBuilder = Callable[..., nnx.Module]

MIXERS: dict[str, MixerBuilder] = {
    "gspn": GSPNMixer,
    "attention": SoftmaxAttention,
    "linfusion": LinFusionAttention,
    "mamba": MambaMixer,
    "mamba2": Mamba2Mixer,
}

# Arguments that every network passes to its mixers.
_GIVEN = ("features", "chunk", "dtype", "rngs")
# Arguments of a network that a mixer may lack.
_DROPPED = ("chunk", "num_heads", "param_dtype")


def find_mixer(mixer: str | MixerBuilder) -> MixerBuilder:
    """Returns the class or function that builds a mixer; ValueError if `MIXERS` lacks the name."""
    if callable(mixer):
        return mixer
    if mixer not in MIXERS:
        raise ValueError(f"mixer: expected a callable or one of {', '.join(MIXERS)}; got {mixer!r}")
    return MIXERS[mixer]


def call_parameters(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a function, class or `functools.partial` by name."""
    while isinstance(build, functools.partial):
        build = build.func
    if not isinstance(build, type):
        return dict(inspect.signature(build).parameters)
    # The signature of the class itself shows only (*args, **kwargs) for NNX modules.
    return dict(list(inspect.signature(build.__init__).parameters.items())[1:])


def mixer_options(mixer: str | MixerBuilder) -> tuple[frozenset[str], bool]:
    """Returns the names of a mixer's options that its network does not set, and whether it takes `**options`."""
    parameters = call_parameters(find_mixer(mixer)).values()
    names = frozenset(p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
    return names - set(_GIVEN), any(p.kind is p.VAR_KEYWORD for p in parameters)


def mixer_builder(mixer: str | MixerBuilder, options: Mapping[str, Any] | None = None) -> MixerBuilder:
    """Returns the function that a network calls for each of its blocks.

    Its arguments are features, `dtype`, `rngs` and, where the network has them, `chunk`, `num_heads` and `param_dtype`.
    It drops those of the last three that the mixer does not take.

    Args:
        mixer: a name in `MIXERS`, or a callable that builds a mixer as this module's docstring describes.
        options: further arguments of the mixer. An argument of the network takes the place of an option of that name.

    Raises:
        ValueError: `MIXERS` lacks the name.
    """
    build = functools.partial(find_mixer(mixer), **(options or {}))
    parameters = call_parameters(build)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    dropped = set() if takes_any else set(_DROPPED) - set(parameters)
    if not dropped:
        return build

    def without_dropped(features: int, **given: Any) -> nnx.Module:
        return build(features, **{key: value for key, value in given.items() if key not in dropped})

    return without_dropped
