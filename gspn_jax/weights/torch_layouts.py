"""Parameters as PyTorch programs hold them: their layouts to ours, and back, and into a module."""

import re
from collections.abc import Iterable, Mapping, Sequence
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


def unwrapped(arrays: Mapping[str, Any], *, wrappers: Sequence[str] = ("model", "state_dict")) -> dict[str, Any]:
    """The parameters by their bare names: out of the first of `wrappers` that is there, without "module."."""
    while (wrapper := next((name for name in wrappers if isinstance(arrays.get(name), Mapping)), None)) is not None:
        arrays = arrays[wrapper]
    if any(name.startswith("param/") for name in arrays):  # a file that holds inputs and outputs too
        arrays = {name.removeprefix("param/"): a for name, a in arrays.items() if name.startswith("param/")}
    return {name.removeprefix("module."): array for name, array in arrays.items()}


def filled[Model: nnx.Module](model: Model, rows: Iterable[Row], arrays: Mapping[str, Any], *, kind: str) -> Model:
    """The module of an abstract one, with parameters.

    Args:
      model: made under `nnx.eval_shape`.
      rows: one for each parameter of the model.
      arrays: bare names to arrays.
      kind: of network, for the message.

    Raises:
      ValueError: a parameter is missing, is left over, or has a shape that does not fit.
    """
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    left = dict(arrays)

    def take(name: str, layout: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in left:
            raise ValueError(f"arrays: expected a parameter {name}, which is missing")
        value = np.asarray(left.pop(name))
        if layout in ("conv", "patch") and value.ndim != 4:
            raise ValueError(f"arrays: expected {name} to have 4 axes, got shape {value.shape}")
        value = to_ours(value, layout)
        if value.shape != shape:
            raise ValueError(f"arrays: expected {name} to give a parameter of shape {shape}, got {value.shape}")
        return value

    for path, names, layout in rows:
        variable = flat[path]
        if isinstance(names, str):
            value = take(names, layout, variable.shape)
        else:
            value = np.stack([take(name, layout, variable.shape[1:]) for name in names])
        flat[path] = variable.replace(jnp.asarray(value, variable.dtype))
    if left:
        raise ValueError(
            f"arrays: expected the parameters of a {kind}, got {len(left)} more: {', '.join(sorted(left)[:5])}"
        )
    return nnx.merge(graph, nnx.from_flat_state(flat))


def shape_of(arrays: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """ValueError if there is no such parameter."""
    if name not in arrays:
        raise ValueError(f"arrays: expected a parameter {name}, which is missing; got {len(arrays)} other names")
    return np.shape(arrays[name])


def denoiser_sizes(arrays: Mapping[str, Any], *, blocks: str) -> dict[str, Any]:
    """num_classes, width, depth, patch and in_channels of a denoiser whose blocks are named `blocks`.<index>.

    Raises:
      ValueError: the parameters that tell them are missing.
    """
    found = [int(match[1]) for match in (re.match(rf"{blocks}\.(\d+)\.", name) for name in arrays) if match]
    if not found:
        raise ValueError(f"arrays: expected parameters named {blocks}.<index>..., got {len(arrays)} other names")
    embed = shape_of(arrays, "x_embedder.proj.weight")
    if len(embed) != 4:
        raise ValueError(f"arrays: expected x_embedder.proj.weight to have 4 axes, got shape {embed}")
    width, in_channels, patch, _ = embed
    return dict(
        num_classes=shape_of(arrays, "y_embedder.embedding_table.weight")[0] - 1,  # the last is "no class"
        width=width,
        depth=1 + max(found),
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
