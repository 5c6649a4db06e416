"""Parameters of Stable Diffusion's autoencoder (AutoencoderKL) under the names of diffusers."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from gspn_jax.models.autoencoder import Autoencoder
from gspn_jax.weights.torch_layouts import (
    Row,
    block_count,
    conv_rows,
    filled,
    linear_rows,
    norm_rows,
    shape_of,
    unwrapped,
)

# Names of attention before diffusers 0.17, which published files hold.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0")]


def diffusers_autoencoder(
    arrays: Mapping[str, Any], *, norm_groups: int = 32, dtype: jnp.dtype = jnp.float32
) -> Autoencoder:
    """Loads an autoencoder. Shapes tell all sizes but the groups of the norms.

    Args:
        arrays: parameter names, old or new, to arrays.
        norm_groups: groups of channels in each norm; 32 in all published autoencoders.
        dtype: of the computation.

    Raises:
        ValueError: names the parameter that is missing, is left over, does not fit, or holds NaN or Inf.
    """
    pattern = re.compile(rf"(\.attentions\.0\.)({'|'.join(_OLD_NAMES)})\.")
    arrays = {
        pattern.sub(lambda match: f"{match[1]}{_OLD_NAMES[match[2]]}.", name): array
        for name, array in unwrapped(arrays).items()
    }
    sizes = _sizes(arrays)
    build = functools.partial(Autoencoder, **sizes, norm_groups=norm_groups, dtype=dtype)
    return filled(build, _rows(sizes["widths"], sizes["blocks"]), arrays, kind="AutoencoderKL")


def _sizes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    levels = block_count(arrays, "encoder.down_blocks")
    return dict(
        widths=tuple(
            shape_of(arrays, f"encoder.down_blocks.{n}.resnets.0.conv1.weight", axes=4)[0] for n in range(levels)
        ),
        blocks=block_count(arrays, "encoder.down_blocks.0.resnets"),
        channels=shape_of(arrays, "decoder.conv_out.weight", axes=4)[0],
        latent_channels=shape_of(arrays, "post_quant_conv.weight")[0],
    )


def res_block_rows(ours: tuple, theirs: str, *, has_shortcut: bool) -> Iterator[Row]:
    """The rows of a residual block without its condition."""
    for name, number in (("first", 1), ("second", 2)):
        yield from norm_rows((*ours, f"{name}_norm"), f"{theirs}.norm{number}")
        yield from conv_rows((*ours, name), f"{theirs}.conv{number}")
    if has_shortcut:
        yield from conv_rows((*ours, "shortcut"), f"{theirs}.conv_shortcut")


def _rows(widths: Sequence[int], blocks: int) -> Iterator[Row]:
    for part, side, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        yield from conv_rows((part, "start"), f"{part}.conv_in")
        ordered = widths if part == "encoder" else widths[::-1]
        for level, (before, width) in enumerate(zip([ordered[0], *ordered], ordered, strict=False)):
            theirs = f"{part}.{side}_blocks.{level}"
            for block in range(count):
                ours, has_shortcut = (part, "levels", level, "blocks", block), block == 0 and before != width
                yield from res_block_rows(ours, f"{theirs}.resnets.{block}", has_shortcut=has_shortcut)
            if level < len(widths) - 1:
                yield from conv_rows((part, "levels", level, "resample"), f"{theirs}.{side}samplers.0.conv")
        middle = f"{part}.mid_block"
        for ours, block in (("first", 0), ("second", 1)):
            yield from res_block_rows((part, "middle", ours), f"{middle}.resnets.{block}", has_shortcut=False)
        yield from norm_rows((part, "middle", "attention", "norm"), f"{middle}.attentions.0.group_norm")
        for ours, theirs in _ATTENTION:
            yield from linear_rows((part, "middle", "attention", ours), f"{middle}.attentions.0.{theirs}")
        yield from norm_rows((part, "norm"), f"{part}.conv_norm_out")
        yield from conv_rows((part, "end"), f"{part}.conv_out")
    yield from conv_rows(("to_moments",), "quant_conv")
    yield from conv_rows(("from_latents",), "post_quant_conv")
