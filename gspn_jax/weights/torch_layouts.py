"""Puts parameters of PyTorch programs into our modules: names, layouts and checks that the networks share."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

# Path of a parameter in our module; its name in their program, or the names of all that a stack holds; its layout.
Row = tuple[tuple, str | Sequence[str], str]

# Both ends of a denoiser of latents, as the programs of DiT and of GSPN's generators name them.
DENOISER_ENDS = [
    ("embed/kernel", "x_embedder.proj.weight", "patch"),
    ("embed/bias", "x_embedder.proj.bias", "vector"),
    ("conditioning/first/kernel", "t_embedder.mlp.0.weight", "linear"),
    ("conditioning/first/bias", "t_embedder.mlp.0.bias", "vector"),
    ("conditioning/second/kernel", "t_embedder.mlp.2.weight", "linear"),
    ("conditioning/second/bias", "t_embedder.mlp.2.bias", "vector"),
    ("conditioning/label/embedding", "y_embedder.embedding_table.weight", "table"),
    ("head/modulation/kernel", "final_layer.adaLN_modulation.1.weight", "linear"),
    ("head/modulation/bias", "final_layer.adaLN_modulation.1.bias", "vector"),
    ("head/linear/kernel", "final_layer.linear.weight", "linear"),
    ("head/linear/bias", "final_layer.linear.bias", "vector"),
]


# What checkpoints hold parameters under. Moving averages come first.
_WRAPPERS = ("ema", "model_ema", "model", "state_dict")


def innermost(arrays: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The parameters of a checkpoint: what "ema" holds where there is one, else "model" or "state_dict"."""
    for _ in range(len(_WRAPPERS)):  # a damaged file may hold itself
        wrapper = next((name for name in _WRAPPERS if isinstance(arrays.get(name), Mapping)), None)
        if wrapper is None:
            break
        arrays = arrays[wrapper]
    return arrays


def unwrapped(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a checkpoint by their bare names: without "module."."""
    arrays = innermost(arrays)
    if any(name.startswith("param/") for name in arrays):  # a file that holds inputs and outputs too
        arrays = {name.removeprefix("param/"): a for name, a in arrays.items() if name.startswith("param/")}
    return {name.removeprefix("module."): array for name, array in arrays.items()}


def filled[Model: nnx.Module](
    build: Callable[..., Model], rows: Iterable[Row], arrays: Mapping[str, Any], *, kind: str
) -> Model:
    """A module with parameters.

    Args:
        build: called as build(rngs=...), gives the module.
        rows: one for each parameter of the module.
        arrays: bare names to arrays.
        kind: of network, for the message.

    Raises:
        ValueError: names the parameter that is missing, is left over, has a shape or dtype that does not fit, or holds
            NaN or Inf.
    """
    rows = list(rows)
    named = [name for _, names, _ in rows for name in ([names] if isinstance(names, str) else names)]
    for name in named:  # before the module is built, which takes long where a name claims a huge number of blocks
        if name not in arrays:
            raise ValueError(f"arrays: expected a parameter {name}, which is missing")
    left = sorted(set(arrays) - set(named))
    if left:
        raise ValueError(f"arrays: expected the parameters of a {kind}, got {len(left)} more: {', '.join(left[:5])}")
    graph, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    for path, names, layout in rows:
        variable = flat[path]
        shape, dtype = variable.shape, variable.dtype
        if isinstance(names, str):
            value = _fitting(arrays, names, layout, shape, dtype)
        else:
            value = np.stack([_fitting(arrays, name, layout, shape[1:], dtype) for name in names])
        flat[path] = variable.replace(jnp.asarray(value))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _fitting(arrays: Mapping[str, Any], name: str, layout: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    value = np.asarray(arrays[name])
    if not jnp.issubdtype(value.dtype, jnp.floating) or value.dtype.itemsize < 2:
        raise ValueError(f"arrays: expected real numbers of 16 bits or more in {name}, got {value.dtype}")
    if value.ndim == 0 or (layout in ("conv", "patch") and value.ndim != 4):
        axes = "4 axes" if value.ndim else "axes"
        raise ValueError(f"arrays: expected {name} to have {axes}, got shape {value.shape}")
    value = to_ours(value, layout)
    if value.shape != shape:
        raise ValueError(f"arrays: expected {name} to give a parameter of shape {shape}, got {value.shape}")
    with np.errstate(over="ignore"):
        value = value.astype(dtype)
    if not np.isfinite(value).all():
        raise ValueError(f"arrays: expected finite numbers in {name}, got NaN or Inf")
    return value


def shape_of(arrays: Mapping[str, Any], name: str, *, axes: int | None = None) -> tuple[int, ...]:
    """The shape of a parameter.

    Raises:
        ValueError: no such parameter, another number of axes, or none; an axis of length 0.
    """
    if name not in arrays:
        raise ValueError(f"arrays: expected a parameter {name}, which is missing; got {len(arrays)} other names")
    shape = np.shape(arrays[name])
    if not shape or 0 in shape or len(shape) != (axes or len(shape)):
        raise ValueError(
            f"arrays: expected {name} to have {axes or 'some'} axes, none of them empty, got shape {shape}"
        )
    return shape


def block_count(arrays: Iterable[str], stem: str) -> int:
    """How many blocks have parameters named <stem>.<index>.<rest>.

    Raises:
        ValueError: there is none, or the indices are not 0, 1, 2, ... without a gap.
    """
    pattern = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
    found = {match[1] for match in map(pattern.match, arrays) if match}
    if not found:
        raise ValueError(f"arrays: expected parameters named {stem}.<index>..., got {len(list(arrays))} other names")
    odd = found - {str(index) for index in range(len(found))}
    if odd:
        raise ValueError(
            f"arrays: expected {stem}.0 to {stem}.{len(found) - 1} without a gap, got {stem}.{min(odd)[:20]}"
        )
    return len(found)


def denoiser_sizes(arrays: Mapping[str, Any], *, blocks: str) -> dict[str, Any]:
    """num_classes, width, depth, patch and in_channels of a denoiser whose blocks are named `blocks`.<index>.

    Raises:
        ValueError: the parameters that tell them are missing or misshapen.
    """
    depth = block_count(arrays, blocks)
    width, in_channels, patch, _ = shape_of(arrays, "x_embedder.proj.weight", axes=4)
    return dict(
        num_classes=shape_of(arrays, "y_embedder.embedding_table.weight", axes=2)[0] - 1,  # the last is "no class"
        width=width,
        depth=depth,
        patch=patch,
        in_channels=in_channels,
    )


def to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    """An array of theirs as ours: "vector", "table", "conv", "patch", "linear", or "logits" of a GSPN module."""
    if layout == "vector":
        return array.reshape(-1)
    if layout == "table":
        return array
    if layout in ("conv", "patch"):  # (out, in, row, column)
        array = array.transpose(2, 3, 1, 0)
        return array if layout == "conv" else array.reshape(-1, array.shape[-1])
    array = array.reshape(array.shape[0], -1).T  # (in, out)
    if layout == "logits":  # theirs count (slot, direction, channel), ours (direction, slot, channel)
        array = array.reshape(array.shape[0], 3, 4, -1).swapaxes(1, 2).reshape(array.shape)
    return array


def to_theirs(array: np.ndarray, layout: str) -> np.ndarray:
    """The way back, for "vector", "conv", "linear" and "logits"."""
    if layout == "vector":
        return array
    if layout == "conv":
        return array.transpose(3, 2, 0, 1)
    if layout == "logits":
        array = array.reshape(array.shape[0], 4, 3, -1).swapaxes(1, 2).reshape(array.shape)
    return array.T
