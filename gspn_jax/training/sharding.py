"""The mesh and who holds what: batches over `data`, large matrices over `model` and, with FSDP, over `data` too."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SMALL = 2**14  # leaves with fewer numbers are cheaper to repeat than to gather


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Attributes:
    data: devices along the batch axis; -1 takes all that `model` leaves.
    model: devices along the channels of large matrices.
    fsdp: whether parameters, averages and moments are also cut along `data`.
    """

    data: int = -1
    model: int = 1
    fsdp: bool = False


def make_mesh(options: MeshOptions) -> Mesh:
    """Returns a mesh with the axes `data` and `model` over the devices of all processes.

    Devices stay in the order of their processes, so that each process holds a contiguous block of batch rows.

    Raises:
        ValueError: the axes do not use the devices exactly, or `model` reaches across processes.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if options.model < 1 or jax.local_device_count() % options.model:
        raise ValueError(
            f"mesh.model: expected a divisor of the {jax.local_device_count()} devices of a process, "
            f"got {options.model}"
        )
    data = len(devices) // options.model if options.data == -1 else options.data
    if data * options.model != len(devices):
        raise ValueError(
            f"mesh.data: expected -1 or {len(devices) // options.model} "
            f"({len(devices)} devices, mesh.model={options.model}), got {options.data}"
        )
    grid = np.array(devices).reshape(data, options.model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def local_mesh() -> Mesh:
    """Returns a mesh with the same axes over the devices of this process alone, all along `data`."""
    grid = np.array(jax.local_devices()).reshape(-1, 1)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def leaf_spec(shape: tuple[int, ...], mesh: Mesh, *, fsdp: bool = False, small: int = SMALL) -> P:
    """Returns how a leaf is cut: `model` on its last dividing axis, with `fsdp` also `data` on the last one left.

    Leaves below `small` numbers and vectors are repeated on every device.
    """
    if math.prod(shape) < small or len(shape) < 2:
        return P()
    axes: list[str | None] = [None] * len(shape)
    for name in ("model", "data") if fsdp else ("model",):
        parts = mesh.shape[name]
        free = [i for i, length in enumerate(shape) if axes[i] is None and length % parts == 0]
        if parts > 1 and free:
            axes[free[-1]] = name
    return P(*axes)


def tree_shardings(abstract: Any, mesh: Mesh, *, fsdp: bool = False, small: int = SMALL) -> Any:
    """Returns a NamedSharding for every leaf of a tree of arrays or ShapeDtypeStructs, by its shape alone.

    Moments and averages have the shapes of their parameters, so they are cut the same way.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, leaf_spec(leaf.shape, mesh, fsdp=fsdp, small=small)), abstract)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over `data`."""
    return NamedSharding(mesh, P("data"))


def check_batch_size(name: str, batch_size: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Raises ValueError unless a global batch splits evenly over `data` in each of `accumulate` parts."""
    parts = mesh.shape["data"] * accumulate
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"{name}: expected a multiple of {parts} (mesh.data={mesh.shape['data']}, accumulation {accumulate}), "
            f"got {batch_size}"
        )


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns global arrays (B, ...) made of the rows (B / processes, ...) that each process holds."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def place_tree(tree: Any, shardings: Any) -> Any:
    """Returns host arrays, equal on every process, as global arrays with the given shardings."""

    def place(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree, shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns host arrays, equal on every process, as global arrays that every device of the mesh holds whole."""
    return place_tree(tree, jax.tree.map(lambda _: NamedSharding(mesh, P()), tree))


def pad_rows(arrays: Any, rows: int) -> Any:
    """Returns host arrays with their last row repeated, so that batches of any size share one compiled program.

    Args:
        arrays: an array (b, ...) or a tree of arrays, with 1 <= b <= rows.
        rows: how many rows each array gets.

    Returns:
        Arrays (rows, ...) in the same tree; an array that has `rows` rows is not copied.

    Raises:
        ValueError: an array has no row or too many.
    """

    def pad(array: np.ndarray) -> np.ndarray:
        if not 1 <= len(array) <= rows:
            raise ValueError(f"arrays: expected 1 to {rows} rows, got {len(array)}")
        if len(array) == rows:
            return array
        return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])

    return jax.tree.map(pad, arrays)
