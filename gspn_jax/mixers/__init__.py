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

__all__ = [
    "MIXERS",
    "GSPNMixer",
    "MixerBuilder",
    "SoftmaxAttention",
    "call_parameters",
    "mixer_builder",
    "mixer_options",
]

MixerBuilder = Callable[..., nnx.Module]  # called as builder(features, chunk=..., dtype=..., rngs=...)

MIXERS: dict[str, MixerBuilder] = {
    "gspn": GSPNMixer,
    "attention": SoftmaxAttention,
}

# Arguments that the network passes to its mixers.
_GIVEN = ("features", "chunk", "dtype", "rngs")


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
    """Returns builder(features, chunk=..., dtype=..., rngs=...), which a network calls for each of its blocks.

    Args:
        mixer: a name in `MIXERS`, or a callable that builds a mixer as this module's docstring describes.
        options: further arguments of the mixer. The builder drops `chunk` if the mixer does not take it.

    Raises:
        ValueError: `MIXERS` lacks the name.
    """
    build = functools.partial(find_mixer(mixer), **(options or {}))
    parameters = call_parameters(build)
    if "chunk" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return build

    def without_chunk(features: int, *, chunk: int | None, **given: Any) -> nnx.Module:
        return build(features, **given)

    return without_chunk
