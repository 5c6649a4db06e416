"""The operations under a mesh: batch and channels are independent, so each device works on its own part.

A kernel is opaque to the partitioner, which would gather its operands. The gradient rules therefore call their kernels
through `sharded`, a `jax.shard_map` over the axes that the caller names.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Mesh axes that split the batch and the channels of one call; None where an axis is not split."""

    batch: str | None = None
    channel: str | None = None
    shares_weights: bool = False  # one weight channel for all: whole on every device of the channel axis

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.batch, self.channel) if name is not None)

    def map_spec(self, rank: int) -> PartitionSpec:
        """Of an array (B, ..., C)."""
        return PartitionSpec(self.batch, *[None] * (rank - 2), self.channel)

    def weight_spec(self, rank: int) -> PartitionSpec:
        """Of an array (B, ..., C_w)."""
        return PartitionSpec(self.batch, *[None] * (rank - 2), None if self.shares_weights else self.channel)


def usable_axes(
    batch: int, channels: int, weight_channels: int, batch_axis: str | None, channel_axis: str | None
) -> MeshAxes:
    """The named axes that can split this call.

    Left out: an axis that the mesh in force lacks, that has one device, that is already manual (a caller's own
    shard_map) or explicit (its arrays carry their sharding themselves), or that does not divide its dimension. The
    channel axis must divide C_w too, unless one weight channel serves all.
    """

    def usable(name: str | None, *sizes: int) -> str | None:
        mesh = jax.sharding.get_abstract_mesh()
        if name is None or name not in mesh.auto_axes or mesh.shape[name] == 1:
            return None
        return None if math.gcd(*sizes) % mesh.shape[name] else name

    shared = weight_channels == 1 and channels > 1
    batch_name = usable(batch_axis, batch)
    channel_name = usable(channel_axis, channels, *([] if shared else [weight_channels]))
    return MeshAxes(batch_name, None if channel_name == batch_name else channel_name, shared)


def sharded(function: Callable, axes: MeshAxes, in_specs: tuple, out_specs) -> Callable:
    """`function` on each device's part, or `function` itself where no axis is split."""
    if not axes.names:
        return function

    def on_each_device(*args):
        leaves, structure = jax.tree.flatten(args)
        return function(*jax.tree.unflatten(structure, vary_alike(*leaves)))

    mapped = jax.shard_map(on_each_device, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes.names))
    return jax.jit(mapped)  # a shard_map over some axes of a mesh cannot run outside of jit


def vary_alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
    """The arrays, made to vary over the same manual axes of a shard_map, ours or the caller's.

    A gradient rule returns what varies like its kernel's result. The gradient of the cast itself is the sum over the
    axes on which an argument did not vary: that of `merge`, for one.
    """

    def varying(array):
        return jax.typeof(array).manual_axis_type.varying

    union = frozenset().union(*(varying(array) for array in arrays if array is not None))

    def cast(array):
        missing = tuple(sorted(union - varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return [None if array is None else cast(array) for array in arrays]
