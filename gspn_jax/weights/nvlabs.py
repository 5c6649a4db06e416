"""The classifiers that the authors of GSPN released: their parameter names to ours, and back."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.mixers import GSPNMixer
from gspn_jax.models.classifier import Classifier

# One row for each parameter of a block: our path in it, their name in it, and how theirs is laid out.
_BLOCK = [
    ("norm/scale", "norm.weight", "vector"),
    ("norm/bias", "norm.bias", "vector"),
    ("widen/kernel", "op.in_proj.weight", "linear"),
    ("depthwise/kernel", "op.conv2d.weight", "conv"),
    ("mixer/proxy/kernel", "op.x_conv_down.weight", "linear"),
    ("mixer/logits/kernel", "op.w_conv_up.weight", "logits"),
    ("mixer/lam/kernel", "op.l_conv_up.weight", "linear"),
    ("mixer/gate/kernel", "op.u_conv_up.weight", "linear"),
    ("mixer/skip/kernel", "op.d_conv.weight", "linear"),
    ("mixer/merge", "op.m_conv.weight", "vector"),
    ("mixer_norm/scale", "op.out_norm.weight", "vector"),
    ("mixer_norm/bias", "op.out_norm.bias", "vector"),
    ("response_norm/scale", "op.grn.gamma", "vector"),
    ("response_norm/bias", "op.grn.beta", "vector"),
    ("narrow/kernel", "op.out_proj.weight", "linear"),
    ("mlp_norm/scale", "norm2.weight", "vector"),
    ("mlp_norm/bias", "norm2.bias", "vector"),
    ("mlp/widen/kernel", "mlp.fc1.weight", "linear"),
    ("mlp/widen/bias", "mlp.fc1.bias", "vector"),
    ("mlp/narrow/kernel", "mlp.fc2.weight", "linear"),
    ("mlp/narrow/bias", "mlp.fc2.bias", "vector"),
]
# Theirs are 4-D where a 1x1 convolution or a GRN holds them; the way back makes them so again.
_POINTWISE = re.compile(r"(x_conv_down|w_conv_up|l_conv_up|u_conv_up|d_conv|m_conv)\.weight$")
_MAP_VECTOR = re.compile(r"grn\.(gamma|beta)$")


def nvlabs_classifier(
    arrays: Mapping[str, Any],
    *,
    alignment: str = "unturned",
    chunk: int = 2,
    global_stages: Sequence[int] = (2, 3),
    dtype: jnp.dtype = jnp.float32,
) -> Classifier:
    """A released GSPN-T, -S or -B, or any network of their form; every size is read off the shapes.

    Args:
      arrays: their parameter names to arrays; wrapped as {"model": ...}, and names that start with "module.", are
        accepted.
      alignment: "unturned" is what the released parameters were trained with.
      chunk: lines of a local block.
      global_stages: stages with global blocks, counted from 0: (2, 3) in T and B, (3,) in S. It cannot be read off.
      dtype: of the computation.

    Returns:
      the network, called on normalised images (B, H, W, 3).

    Raises:
      ValueError: a parameter is missing, is left over, or has a shape that does not fit.
    """
    arrays = _unwrapped(arrays)
    sizes = nvlabs_classifier_sizes(arrays)
    proxy_rank = sizes.pop("proxy_rank")
    mixer = functools.partial(GSPNMixer, proxy_rank=proxy_rank, alignment=alignment)
    build = functools.partial(
        Classifier, **sizes, mixer=mixer, chunk=chunk, global_stages=tuple(global_stages), dtype=dtype
    )
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    left = dict(arrays)
    for path, name, layout in _names(sizes["depths"]):
        if name not in left:
            raise ValueError(f"arrays: expected a parameter {name}, which is missing")
        variable = flat[path]
        value = _to_ours(np.asarray(left.pop(name)), layout)
        if value.shape != variable.shape:
            raise ValueError(
                f"arrays: expected {name} to give a parameter of shape {variable.shape}, got {value.shape}"
            )
        flat[path] = variable.replace(jnp.asarray(value, variable.dtype))
    if left:
        raise ValueError(
            f"arrays: expected the parameters of a GSPN classifier, got {len(left)} more: {', '.join(sorted(left)[:5])}"
        )
    return nnx.merge(graph, nnx.from_flat_state(flat))


def nvlabs_classifier_arrays(model: Classifier) -> dict[str, np.ndarray]:
    """The way back: the parameters of a four-stage classifier with GSPN mixers under the authors' names and shapes."""
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    arrays = {}
    for path, name, layout in _names([len(stage) for stage in model.stages]):
        array = _to_theirs(np.asarray(state[path][...]), layout)
        if _POINTWISE.search(name):
            array = array.reshape(1, 4, 1, 1) if "m_conv" in name else array[..., None, None]
        elif _MAP_VECTOR.search(name):
            array = array.reshape(1, -1, 1, 1)
        arrays[name] = array
    return arrays


def _names(depths: Sequence[int]) -> Iterator[tuple[tuple, str, str]]:
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
            for ours, theirs, layout in _BLOCK:
                yield ("stages", stage, index, *ours.split("/")), f"layers.{stage}.blocks.{index}.{theirs}", layout
        if stage + 1 < len(depths):
            yield from pair(("downsamples", stage, "conv"), f"layers.{stage}.downsample.1")
            yield from pair(("downsamples", stage, "norm"), f"layers.{stage}.downsample.3", "vector")
    yield from pair(("norm",), "classifier.norm", "vector")
    yield from pair(("head",), "classifier.head", "linear")


def _unwrapped(arrays: Mapping[str, Any]) -> dict[str, Any]:
    while set(arrays) & {"model", "state_dict"} and isinstance(
        wrapped := arrays.get("model", arrays.get("state_dict")), Mapping
    ):
        arrays = wrapped
    if any(name.startswith("param/") for name in arrays):  # a file that holds inputs and outputs too
        arrays = {name.removeprefix("param/"): a for name, a in arrays.items() if name.startswith("param/")}
    return {name.removeprefix("module."): array for name, array in arrays.items()}


def nvlabs_classifier_sizes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """num_classes, widths, depths, proxy_rank, expansion and mlp_ratio of what `nvlabs_classifier` takes.

    Raises:
      ValueError: the parameters that tell them are missing.
    """
    arrays = _unwrapped(arrays)

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays:
            raise ValueError(f"arrays: expected a parameter {name}, which is missing; got {len(arrays)} other names")
        return np.shape(arrays[name])

    blocks = [
        match.groups() for match in (re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in arrays) if match
    ]
    if not blocks:
        raise ValueError(
            f"arrays: expected parameters named layers.<stage>.blocks.<index>..., got {len(arrays)} other names"
        )
    stages = 1 + max(int(stage) for stage, _ in blocks)
    depths = [1 + max((int(index) for s, index in blocks if int(s) == stage), default=-1) for stage in range(stages)]
    widths = [shape(f"layers.{stage}.blocks.0.norm.weight")[0] for stage in range(stages)]
    return dict(
        num_classes=shape("classifier.head.weight")[0],
        widths=tuple(widths),
        depths=tuple(depths),
        proxy_rank=shape("layers.0.blocks.0.op.x_conv_down.weight")[0],
        expansion=shape("layers.0.blocks.0.op.in_proj.weight")[0] / widths[0],
        mlp_ratio=shape("layers.0.blocks.0.mlp.fc1.weight")[0] / widths[0],
    )


def _to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "vector":
        return array.reshape(-1)
    if layout == "conv":  # (out, in, row, column)
        return array.transpose(2, 3, 1, 0)
    array = array.reshape(array.shape[0], -1).T  # (in, out)
    if layout == "logits":  # theirs count (slot, direction, channel), ours (direction, slot, channel)
        array = array.reshape(array.shape[0], 3, 4, -1).swapaxes(1, 2).reshape(array.shape)
    return array


def _to_theirs(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "vector":
        return array
    if layout == "conv":
        return array.transpose(3, 2, 0, 1)
    if layout == "logits":
        array = array.reshape(array.shape[0], 4, 3, -1).swapaxes(1, 2).reshape(array.shape)
    return array.T
