"""Operations under a mesh: images and channels are independent, so each device works on its own part.

XLA's partitioner cannot look into a kernel and would gather its operands. The gradient rules therefore call kernels
through `sharded`, a `jax.shard_map` over the axes that the caller names.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """The mesh axes that split the batch and the channels in one call; None where an axis is not split."""

    batch: str | None = None
    channel: str | None = None
    shares_weights: bool = False  # C_w = 1: every device on the channel axis holds the whole weight channel

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.batch, self.channel) if name is not None)

    def map_spec(self, rank: int) -> PartitionSpec:
        """The spec of an array (B, ..., C) with `rank` axes."""
        return PartitionSpec(self.batch, *[None] * (rank - 2), self.channel)

    def weight_spec(self, rank: int) -> PartitionSpec:
        """The spec of an array (B, ..., C_w) with `rank` axes."""
        return PartitionSpec(self.batch, *[None] * (rank - 2), None if self.shares_weights else self.channel)


def usable_axes(
    batch: int, channels: int, weight_channels: int, batch_axis: str | None, channel_axis: str | None
) -> MeshAxes:
    """The named mesh axes that can split this call.

    An axis is left out if the current mesh lacks it, if it has one device, if it is already manual (inside a caller's
    own shard_map) or explicit (its arrays carry their sharding themselves), or if it does not divide its dimension or
    the dimension is symbolic. The channel axis must also divide C_w, unless C_w is 1.
    """

    def usable(name: str | None, *sizes: int) -> str | None:
        mesh = jax.sharding.get_abstract_mesh()
        if name is None or name not in mesh.auto_axes or mesh.shape[name] == 1:
            return None
        return name if all(isinstance(size, int) and size % mesh.shape[name] == 0 for size in sizes) else None

    shared = weight_channels == 1 and channels > 1
    batch_name = usable(batch_axis, batch)
    channel_name = usable(channel_axis, channels, *([] if shared else [weight_channels]))
    return MeshAxes(batch_name, None if channel_name == batch_name else channel_name, shared)


def sharded(function: Callable, axes: MeshAxes, in_specs: tuple, out_specs) -> Callable:
    """`function` on each device's part of its arguments, or `function` itself where no axis is split."""
    if not axes.names:
        return function

    def on_each_device(*args):
        leaves, structure = jax.tree.flatten(args)
        return function(*jax.tree.unflatten(structure, vary_alike(*leaves)))

    mapped = jax.shard_map(on_each_device, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes.names))
    return jax.jit(mapped)  # a shard_map over only some axes of a mesh cannot run outside jit


def vary_alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
    """The arrays, cast so that all vary over the same manual axes of a shard_map, ours or the caller's.

    A gradient rule must return gradients that vary like its arguments. The gradient of the cast is the sum over the
    axes on which an argument did not vary; `merge` gets its sum over devices this way.
    """

    def varying(array):
        return jax.typeof(array).manual_axis_type.varying

    union = frozenset().union(*(varying(array) for array in arrays if array is not None))

    def cast(array):
        missing = tuple(sorted(union - varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return [None if array is None else cast(array) for array in arrays]
