"""Puts parameters of PyTorch programs into our modules: names, layouts and checks that the networks share."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Joined(tuple[str, ...]):
    """Names of tensors that are joined along their first axis."""


# Path of a parameter in our module; its name in their program (several, `Joined`), or those of all that a stack holds;
# its layout.
Row = tuple[tuple, str | Joined | Sequence[str | Joined], str]

# More faults than these are of another network: the first tell enough.
_MOST_FAULTS = 20

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
    return {bare: arrays[name] for bare, name in bare_names(arrays).items()}


def bare_names(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Bare names of the parameters to their names in the mapping; no array is read."""
    names = list(arrays)
    if any(name.startswith("param/") for name in names):  # a file that holds inputs and outputs too
        names = [name for name in names if name.startswith("param/")]
    return {name.removeprefix("param/").removeprefix("module."): name for name in names}


def filled[Model: nnx.Module](
    build: Callable[..., Model], rows: Iterable[Row], arrays: Mapping[str, Any], *, kind: str
) -> Model:
    """A module with parameters: `fill` for a module that is not built yet.

    Args:
        build: called as build(rngs=...), gives the module.
        rows: one for each parameter of the module.
        arrays: bare names to arrays.
        kind: of network, for the message.

    Raises:
        ValueError: as `fill`.
    """
    rows = list(rows)
    faults = _name_faults(rows, arrays, kind)
    if len(faults) > _MOST_FAULTS:  # building takes long where a name claims a huge number of blocks
        raise ValueError(_told(faults))
    return fill(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), rows, arrays, kind=kind)


def fill[Model: nnx.Module](model: Model, rows: Iterable[Row], arrays: Mapping[str, Any], *, kind: str) -> Model:
    """A module with parameters, which are read and converted one after another.

    Args:
        model: the abstract module, of `nnx.eval_shape`.
        rows: one for each parameter. A parameter without a row stays a `jax.ShapeDtypeStruct`.
        arrays: bare names to arrays. Instead of an array, a `jax.ShapeDtypeStruct` is checked, and the parameter stays
            one.
        kind: of network, for the message.

    Raises:
        ValueError: names all parameters that are missing, are left over, have a shape or dtype that does not fit, or
            hold NaN or Inf; the first 20 of them.
    """
    rows = list(rows)
    faults = _name_faults(rows, arrays, kind)
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    for path, names, layout in rows:
        variable, slices = flat[path], _slices(names)
        is_stack = not isinstance(names, str | Joined)
        shape = variable.shape[1:] if is_stack else variable.shape
        values = []
        for each in slices:
            try:
                values += [_fitting(arrays, each, layout, shape, variable.dtype)] if _has(arrays, each) else []
            except ValueError as error:
                faults.append(str(error))
        if len(values) == len(slices) and all(value is not None for value in values):
            flat[path] = variable.replace(jnp.asarray(np.stack(values) if is_stack else values[0]))
    if faults:
        raise ValueError(_told(faults))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _name_faults(rows: Iterable[Row], arrays: Mapping[str, Any], kind: str) -> list[str]:
    """What is missing and what is left over."""
    named = named_tensors(rows)
    faults = [f"expected a parameter {name}, which is missing" for name in named if name not in arrays]
    left = sorted(set(arrays) - set(named))
    if left:
        faults.append(f"expected the parameters of a {kind}, got {len(left)} more: {', '.join(left[:5])}")
    return faults


def named_tensors(rows: Iterable[Row]) -> dict[str, None]:
    """Names of all tensors of some rows, in their order."""
    return dict.fromkeys(name for _, names, _ in rows for each in _slices(names) for name in each)


def _has(arrays: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(name in arrays for name in names)


def _slices(names: str | Joined | Sequence[str | Joined]) -> list[tuple[str, ...]]:
    """The tensors of each slice of a stack, or of the one that is no stack."""
    listed = [names] if isinstance(names, str | Joined) else names
    return [(each,) if isinstance(each, str) else each for each in listed]


def _told(faults: Sequence[str]) -> str:
    if len(faults) == 1:
        return f"arrays: {faults[0]}"
    more = [f"and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
    return f"arrays: {len(faults)} faults: {'; '.join([*faults[:_MOST_FAULTS], *more])}"


def _fitting(
    arrays: Mapping[str, Any], names: Sequence[str], layout: str, shape: tuple[int, ...], dtype: Any
) -> np.ndarray | None:
    """Tensors, joined, as a parameter of ours; None for what has a shape and a dtype only. ValueError without start."""
    parts, is_abstract = [], False
    for name in names:
        value = arrays[name]
        if isinstance(value, jax.ShapeDtypeStruct):
            is_abstract, value = True, np.broadcast_to(np.zeros((), value.dtype), value.shape)
        value = np.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating) or value.dtype.itemsize < 2:
            raise ValueError(f"expected real numbers of 16 bits or more in {name}, got {value.dtype}")
        if value.ndim == 0 or (layout in ("conv", "patch") and value.ndim != 4):
            axes = "4 axes" if value.ndim else "axes"
            raise ValueError(f"expected {name} to have {axes}, got shape {value.shape}")
        parts.append(value)
    name = " with ".join(names)
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"expected {name} to have rows of one length, got {[part.shape for part in parts]}")
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    expected = f"expected {name} to give a parameter of shape {shape}"
    try:
        value = to_ours(joined, layout)
    except ValueError as error:  # an axis that the layout cannot split
        raise ValueError(f"{expected}, got a tensor of shape {joined.shape}") from error
    if value.shape != shape:
        raise ValueError(f"{expected}, got {value.shape}")
    if is_abstract:
        return None
    with np.errstate(over="ignore"):
        value = value.astype(dtype)
    if not np.isfinite(value).all():
        raise ValueError(f"expected finite numbers in {name}, got NaN or Inf")
    return value


def conv_rows(ours: tuple, theirs: str) -> Iterator[Row]:
    """The rows of a convolution with bias."""
    yield (*ours, "kernel"), f"{theirs}.weight", "conv"
    yield (*ours, "bias"), f"{theirs}.bias", "vector"


def norm_rows(ours: tuple, theirs: str | Sequence[str]) -> Iterator[Row]:
    """The rows of a norm, or of a stack of norms."""
    yield (*ours, "scale"), _suffixed(theirs, ".weight"), "vector"
    yield (*ours, "bias"), _suffixed(theirs, ".bias"), "vector"


def linear_rows(ours: tuple, theirs: str | Sequence[str], *, use_bias: bool = True) -> Iterator[Row]:
    """The rows of a linear layer or a 1x1 convolution, or of a stack of linear layers."""
    yield (*ours, "kernel"), _suffixed(theirs, ".weight"), "linear"
    if use_bias:
        yield (*ours, "bias"), _suffixed(theirs, ".bias"), "vector"


def _suffixed(names: str | Sequence[str], suffix: str) -> str | list[str]:
    return names + suffix if isinstance(names, str) else [name + suffix for name in names]


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
    """An array of theirs as ours.

    | layout | theirs | ours |
    |---|---|---|
    | vector | (n,), or with axes of length 1 | (n,) |
    | table | any | the same |
    | conv | (out, in, row, column) | (row, column, in, out) |
    | patch | (out, in, row, column) | (row * column * in, out) |
    | linear | (out, in), or with axes of length 1 | (in, out) |
    | pointwise | (out, in, 1, 1) | (in, out) |
    | taps | (n, 1, taps) | (taps, n) |
    | logits | (slot * direction * channel, in, 1, 1) | (in, direction * slot * channel) |
    | map_vector | (1, n, 1, 1) | (n,) |
    """
    if layout in ("vector", "map_vector"):
        return array.reshape(-1)
    if layout == "table":
        return array
    if layout in ("conv", "patch"):
        array = array.transpose(2, 3, 1, 0)
        return array if layout == "conv" else array.reshape(-1, array.shape[-1])
    array = array.reshape(array.shape[0], -1).T
    if layout == "logits":
        array = array.reshape(array.shape[0], 3, 4, -1).swapaxes(1, 2).reshape(array.shape)
    return array


def to_theirs(array: np.ndarray, layout: str) -> np.ndarray:
    """The way back of `to_ours`, for all layouts but "patch"."""
    if layout in ("vector", "table"):
        return array
    if layout == "map_vector":
        return array.reshape(1, -1, 1, 1)
    if layout == "conv":
        return array.transpose(3, 2, 0, 1)
    if layout == "logits":
        array = array.reshape(array.shape[0], 4, 3, -1).swapaxes(1, 2).reshape(array.shape)
    array = array.T
    if layout == "taps":
        return array[:, None]
    return array[..., None, None] if layout in ("pointwise", "logits") else array


def exported(state: Mapping[tuple, Any], rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """Parameters under their names and in their layouts: the way back of `filled`.

    Args:
        state: path to variable, as `flax.nnx.to_flat_state` gives it.
        rows: as those of `filled`.
    """
    arrays = {}
    for path, names, layout in rows:
        value = np.asarray(state[path][...])
        named = {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))
        for name, array in named.items():
            # safetensors writes the memory of an array, not its elements
            arrays[name] = np.ascontiguousarray(to_theirs(array, layout))
    return arrays
