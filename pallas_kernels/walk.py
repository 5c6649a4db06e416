"""The index arithmetic of the reference: the lines of a map in the order of a direction, and a pixel's neighbours.

Lines are read and written in place: nothing is transposed, mirrored or copied. The axis that the scan walks is seen as
(chunks, lines of a chunk), and all chunks advance together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.directions import neighbour_axis, walked_axis, walks_back


@dataclasses.dataclass(frozen=True)
class Walk:
    """The lines of a (B, H, W, ...) map in the order of a direction. Index 0 is the first line of each chunk.

    Attributes:
        direction: a name in `DIRECTIONS`.
        shape: (B, H, W, C) of x.
        chunk: lines after which the scan restarts, or None.
    """

    direction: str
    shape: tuple[int, ...]
    chunk: int | None

    @property
    def length(self) -> int:
        return self.shape[walked_axis(self.direction)]

    @property
    def lines(self) -> int:
        """Lines of a chunk; of the whole map without chunks."""
        return min(self.chunk or self.length, self.length)

    @property
    def indices(self) -> jax.Array:
        """The indices of a chunk's lines."""
        return jnp.arange(self.lines)

    @property
    def _count(self) -> int:
        return -(-self.length // self.lines)

    @property
    def _axis(self) -> int:
        """The axis of a chunk's lines; where there are several chunks, their axis comes before it."""
        return walked_axis(self.direction) + (self._count > 1)

    @property
    def _slot_axis(self) -> int:
        """The first axis of `chunks(array)` after B, H and W."""
        return 3 + (self._count > 1)

    @property
    def pixel_axis(self) -> int:
        """The axis of a line along which the neighbours lie. A line is (B, H, ...), or (B, [chunks,] W, ...)."""
        return 2 if neighbour_axis(self.direction) == 2 and self._count > 1 else 1

    def chunks(self, array: jax.Array) -> jax.Array:
        """(B, H, W, ...) with the walked axis split into (chunks, lines); unchanged where there is one chunk.

        Zeros fill the last chunk.
        """
        if self._count == 1:
            return array
        axis = walked_axis(self.direction)
        missing = self._count * self.lines - self.length
        if missing:
            widths = [(0, 0)] * array.ndim
            widths[axis] = (missing, 0) if walks_back(self.direction) else (0, missing)
            array = jnp.pad(array, widths)
        return array.reshape(*array.shape[:axis], self._count, self.lines, *array.shape[axis + 1 :])

    def whole(self, array: jax.Array) -> jax.Array:
        """The inverse of `chunks`."""
        if self._count == 1:
            return array
        axis = walked_axis(self.direction)
        array = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
        start = array.shape[axis] - self.length if walks_back(self.direction) else 0
        return lax.slice_in_dim(array, start, start + self.length, axis=axis)

    def ordered(self, array: jax.Array) -> jax.Array:
        """(B, H, W, ...) copied to (lines, B, ...), in the order of the walk."""
        array = jnp.moveaxis(self.chunks(array), self._axis, 0)
        return array[::-1] if walks_back(self.direction) else array

    def in_place(self, array: jax.Array) -> jax.Array:
        """The inverse of `ordered`."""
        return self.whole(jnp.moveaxis(array[::-1] if walks_back(self.direction) else array, 0, self._axis))

    def line(self, array: jax.Array, index, *slots: int) -> jax.Array:
        """Line `index` of each chunk; the axis of the lines is dropped.

        Args:
            array: from `chunks`.
            index: 0 is the line where the walk starts.
            slots: indices into the axes after (B, H, W), such as the direction and the neighbour; these axes are
                dropped too.
        """
        line = lax.dynamic_index_in_dim(array, self._place(index), self._axis, keepdims=False)
        for slot in slots:
            line = lax.index_in_dim(line, slot, self._slot_axis - 1, keepdims=False)
        return line

    def put(self, array: jax.Array, line: jax.Array, index, *slots: int) -> jax.Array:
        """`array` with its line `index` replaced."""
        slot_axes = range(self._slot_axis, self._slot_axis + len(slots))
        start = [0] * array.ndim
        start[self._axis] = self._place(index)
        start[self._slot_axis : self._slot_axis + len(slots)] = slots
        line = jnp.expand_dims(line, (self._axis, *slot_axes))
        return lax.dynamic_update_slice(array, line.astype(array.dtype), start)

    def _place(self, index):
        return self.lines - 1 - index if walks_back(self.direction) else index

    def halo(self, line: jax.Array) -> jax.Array:
        """A line of zeros with one extra pixel at each end, which stays zero because h is 0 outside the image.

        Neighbours are then slices at an offset. If each line were padded instead, XLA would not vectorise the loop on
        a CPU.
        """
        widths = [(1, 1) if i == self.pixel_axis else (0, 0) for i in range(line.ndim)]
        # Without the barrier XLA makes the zeros of all scans of a program at its start, each in memory until its scan.
        return lax.optimization_barrier((jnp.pad(jnp.zeros_like(line), widths), line))[0]

    def fill(self, halo: jax.Array, line: jax.Array) -> jax.Array:
        """`halo` with `line` between its two ends."""
        return lax.dynamic_update_slice_in_dim(halo, line, 1, self.pixel_axis)

    def neighbours(self, halo: jax.Array) -> list[jax.Array]:
        """The line in `halo` seen from each pixel's neighbour of smaller, same and larger index."""
        size = halo.shape[self.pixel_axis] - 2
        return [lax.slice_in_dim(halo, start, start + size, axis=self.pixel_axis) for start in range(3)]


def spread(w: jax.Array, channels: int) -> jax.Array:
    """Weights (..., C_w) as (..., C): channel c uses weight channel c // (C / C_w). C_w = 1 is left to broadcasting."""
    weight_channels = w.shape[-1]
    return w if weight_channels in (1, channels) else jnp.repeat(w, channels // weight_channels, axis=-1)


def gathered(products: jax.Array, weight_channels: int) -> jax.Array:
    """The transpose of `spread`: (..., C) summed to (..., C_w) over the channels that share a weight."""
    channels = products.shape[-1]
    if weight_channels == channels:
        return products
    return products.reshape(*products.shape[:-1], weight_channels, channels // weight_channels).sum(-1)
