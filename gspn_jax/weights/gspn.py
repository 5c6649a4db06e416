"""Parameters of the networks that the authors of GSPN released: from their names to ours, and back for classifiers."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.mixers import GSPNMixer
from gspn_jax.models.classifier import Classifier
from gspn_jax.models.generator import Generator
from gspn_jax.weights.torch_layouts import (
    DENOISER_ENDS,
    Row,
    block_count,
    denoiser_sizes,
    exported,
    filled,
    shape_of,
    unwrapped,
)

# One row for each parameter of a mixer or block: our path in it, their name in it, and how theirs is laid out.
GSPN_MIXER = [
    ("proxy/kernel", "x_conv_down.weight", "pointwise"),
    ("logits/kernel", "w_conv_up.weight", "logits"),
    ("lam/kernel", "l_conv_up.weight", "pointwise"),
    ("gate/kernel", "u_conv_up.weight", "pointwise"),
    ("skip/kernel", "d_conv.weight", "pointwise"),
    ("merge", "m_conv.weight", "map_vector"),
]
_CLASSIFIER_BLOCK = [
    ("norm/scale", "norm.weight", "vector"),
    ("norm/bias", "norm.bias", "vector"),
    ("widen/kernel", "op.in_proj.weight", "linear"),
    ("depthwise/kernel", "op.conv2d.weight", "conv"),
    *((f"mixer/{ours}", f"op.{theirs}", layout) for ours, theirs, layout in GSPN_MIXER),
    ("mixer_norm/scale", "op.out_norm.weight", "vector"),
    ("mixer_norm/bias", "op.out_norm.bias", "vector"),
    ("response_norm/scale", "op.grn.gamma", "map_vector"),
    ("response_norm/bias", "op.grn.beta", "map_vector"),
    ("narrow/kernel", "op.out_proj.weight", "linear"),
    ("mlp_norm/scale", "norm2.weight", "vector"),
    ("mlp_norm/bias", "norm2.bias", "vector"),
    ("mlp/widen/kernel", "mlp.fc1.weight", "linear"),
    ("mlp/widen/bias", "mlp.fc1.bias", "vector"),
    ("mlp/narrow/kernel", "mlp.fc2.weight", "linear"),
    ("mlp/narrow/bias", "mlp.fc2.bias", "vector"),
]
_GENERATOR_BLOCK = [
    ("norm/scale", "norm.weight", "vector"),
    ("norm/bias", "norm.bias", "vector"),
    ("project/kernel", "in_proj.weight", "linear"),
    ("depthwise/kernel", "conv2d.weight", "conv"),
    ("depthwise/bias", "conv2d.bias", "vector"),
    *((f"mixer/{ours}", theirs, layout) for ours, theirs, layout in GSPN_MIXER),
    ("forward_in/kernel", "out_conv.weight", "linear"),
    ("forward_depthwise/kernel", "out_dconv.weight", "conv"),
    ("forward_out/kernel", "out_proj.weight", "linear"),
]
_LONG_SKIP = [
    ("long_skip/kernel", "skip_linear.weight", "linear"),
    ("long_skip/bias", "skip_linear.bias", "vector"),
]
_GENERATOR_ENDS = [
    *DENOISER_ENDS,
    ("norm/scale", "norm_f.weight", "vector"),
    ("norm/bias", "norm_f.bias", "vector"),
]


def nvlabs_classifier(
    arrays: Mapping[str, Any],
    *,
    alignment: str = "unturned",
    chunk: int = 2,
    global_stages: Sequence[int] = (2, 3),
    dtype: jnp.dtype = jnp.float32,
) -> Classifier:
    """Loads GSPN-T, -S or -B, or any classifier with their parameters' names. Shapes tell all sizes.

    Args:
        arrays: the authors' parameter names to arrays; a checkpoint around them and names that start with "module."
            are accepted. Of a checkpoint, the moving averages ("ema") are taken where there are some, else "model".
        alignment: "unturned" is what the released parameters were trained with.
        chunk: lines of a local block.
        global_stages: stages with global blocks, counted from 0: (2, 3) in T and B, (3,) in S. No shape tells them.
        dtype: of the computation.

    Returns:
        the network; it takes normalised images (B, H, W, 3).

    Raises:
        ValueError: names the parameter that is missing, is left over, does not fit, or holds NaN or Inf.
    """
    arrays = unwrapped(arrays)
    sizes = nvlabs_classifier_sizes(arrays)
    proxy_rank = sizes.pop("proxy_rank")
    mixer = functools.partial(GSPNMixer, proxy_rank=proxy_rank, alignment=alignment)
    build = functools.partial(
        Classifier, **sizes, mixer=mixer, chunk=chunk, global_stages=tuple(global_stages), dtype=dtype
    )
    return filled(build, _classifier_rows(sizes["depths"]), arrays, kind="GSPN classifier")


def nvlabs_classifier_arrays(model: Classifier) -> dict[str, np.ndarray]:
    """The parameters of a classifier with stem stride 4 and GSPN mixers under the authors' names and shapes."""
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return exported(state, _classifier_rows([len(stage) for stage in model.stages]))


def _classifier_rows(depths: Sequence[int]) -> Iterator[Row]:
    """Our path, their name and its layout, of every parameter."""

    def pair(ours, theirs, kind="conv"):
        for leaf, suffix, layout in (("kernel", "weight", kind), ("bias", "bias", "vector")):
            yield (*ours, leaf if kind != "vector" or leaf != "kernel" else "scale"), f"{theirs}.{suffix}", layout

    yield from pair(("stem", "first"), "patch_embed.0")
    yield from pair(("stem", "first_norm"), "patch_embed.2", "vector")
    yield from pair(("stem", "second"), "patch_embed.5")
    yield from pair(("stem", "second_norm"), "patch_embed.7", "vector")
    for stage, depth in enumerate(depths):
        for index in range(depth):
            for ours, theirs, layout in _CLASSIFIER_BLOCK:
                yield ("stages", stage, index, *ours.split("/")), f"layers.{stage}.blocks.{index}.{theirs}", layout
        if stage + 1 < len(depths):
            yield from pair(("downsamples", stage, "conv"), f"layers.{stage}.downsample.1")
            yield from pair(("downsamples", stage, "norm"), f"layers.{stage}.downsample.3", "vector")
    yield from pair(("norm",), "classifier.norm", "vector")
    yield from pair(("head",), "classifier.head", "linear")


def nvlabs_classifier_sizes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Reads num_classes, widths, depths, proxy_rank, expansion and mlp_ratio off the arrays for `nvlabs_classifier`.

    Raises:
        ValueError: names the parameter that is missing or misshapen.
    """
    arrays = unwrapped(arrays)
    stages = block_count(arrays, "layers")
    width = shape_of(arrays, "layers.0.blocks.0.norm.weight", axes=1)[0]
    return dict(
        num_classes=shape_of(arrays, "classifier.head.weight", axes=2)[0],
        widths=tuple(shape_of(arrays, f"layers.{stage}.blocks.0.norm.weight", axes=1)[0] for stage in range(stages)),
        depths=tuple(block_count(arrays, f"layers.{stage}.blocks") for stage in range(stages)),
        proxy_rank=shape_of(arrays, "layers.0.blocks.0.op.x_conv_down.weight")[0],
        expansion=shape_of(arrays, "layers.0.blocks.0.op.in_proj.weight")[0] / width,
        mlp_ratio=shape_of(arrays, "layers.0.blocks.0.mlp.fc1.weight")[0] / width,
    )


def nvlabs_generator(
    arrays: Mapping[str, Any],
    *,
    alignment: str = "unturned",
    chunk: int | None = 2,
    global_blocks: Sequence[int] = (),
    dtype: jnp.dtype = jnp.float32,
) -> Generator:
    """Loads a GSPN generator, or any network with its parameters' names. Shapes tell all sizes.

    Args:
        arrays: the authors' parameter names to arrays, or a checkpoint, as in `nvlabs_classifier`.
        alignment: "unturned" is what the released parameters were trained with.
        chunk: lines of a local block.
        global_blocks: blocks that propagate globally, counted from 0 in order of execution. By default none: the
            authors' program means the last two, but leaves all blocks local.
        dtype: of the computation.

    Returns:
        the network; it takes latents (B, H, W, 4), timestep (B,) and label (B,).

    Raises:
        ValueError: names the parameter that is missing, is left over, does not fit, or holds NaN or Inf.
    """
    arrays = unwrapped(arrays)
    sizes = nvlabs_generator_sizes(arrays)
    mixer = functools.partial(GSPNMixer, proxy_rank=sizes.pop("proxy_rank"), alignment=alignment)
    build = functools.partial(
        Generator, **sizes, mixer=mixer, chunk=chunk, global_blocks=tuple(global_blocks), dtype=dtype
    )
    return filled(build, _generator_rows(sizes["depth"] // 2), arrays, kind="GSPN generator")


def _generator_rows(half: int) -> Iterator[Row]:
    for ours, theirs, layout in _GENERATOR_ENDS:
        yield tuple(ours.split("/")), theirs, layout
    for ours, theirs, layout in _GENERATOR_BLOCK:
        yield ("mid_block", *ours.split("/")), f"mid_block.{theirs}", layout
    for stack, rows in (("in_blocks", _GENERATOR_BLOCK), ("out_blocks", _GENERATOR_BLOCK + _LONG_SKIP)):
        for ours, theirs, layout in rows:
            yield (stack, *ours.split("/")), [f"{stack}.{index}.{theirs}" for index in range(half)], layout


def nvlabs_generator_sizes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Reads num_classes, width, depth, patch, in_channels and proxy_rank off the arrays for `nvlabs_generator`.

    Raises:
        ValueError: names the parameter that is missing or misshapen.
    """
    arrays = unwrapped(arrays)
    sizes = denoiser_sizes(arrays, blocks="in_blocks")
    return sizes | dict(depth=2 * sizes["depth"], proxy_rank=shape_of(arrays, "mid_block.x_conv_down.weight")[0])
