"""How a direction meets the lines of a map, and what a line passes on: the index arithmetic of the reference.

Lines are read and written where they lie: nothing is transposed, mirrored or copied. The axis that the scan walks is
seen as (chunks, lines of a chunk), and the chunks advance together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.directions import neighbour_axis, walked_axis, walks_back


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a direction meets the lines of a (B, H, W, ...) map. Index 0 is the first line of each chunk."""

    direction: str
    shape: tuple[int, ...]  # of x
    chunk: int | None

    @property
    def length(self) -> int:
        return self.shape[walked_axis(self.direction)]

    @property
    def lines(self) -> int:
        """Lines of a chunk, or of the map."""
        return min(self.chunk or self.length, self.length)

    @property
    def _count(self) -> int:
        return -(-self.length // self.lines)

    @property
    def _axis(self) -> int:
        """The axis of the lines of a chunk, after that of the chunks where there are several."""
        return walked_axis(self.direction) + (self._count > 1)

    @property
    def _slot_axis(self) -> int:
        """The first axis of `chunks` after those of (B, H, W)."""
        return 3 + (self._count > 1)

    @property
    def pixel_axis(self) -> int:
        """The axis of a line along which the three neighbours lie: (B, H, ...), or (B, W, ...), chunks before W."""
        return 2 if neighbour_axis(self.direction) == 2 and self._count > 1 else 1

    def chunks(self, array: jax.Array) -> jax.Array:
        """(B, H, W, ...) with the walked axis as (chunks, lines), or as it is where there is one chunk.

        Where the last chunk is not full, zeros fill it.
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

    def line(self, array: jax.Array, index, *slots: int) -> jax.Array:
        """Line `index` of each chunk, without the axis of the lines.

        Args:
          array: as `chunks` gives it.
          index: 0 is the line where the walk starts.
          slots: entries of the axes after (B, H, W), which go too: of a direction, of a neighbour.
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
        """A line of zeros with one pixel more at each end, which stays zero: outside the image h is 0.

        A neighbour is then an offset. Padding each line instead keeps XLA from vectorising the loop on a CPU.
        """
        return jnp.pad(jnp.zeros_like(line), [(1, 1) if i == self.pixel_axis else (0, 0) for i in range(line.ndim)])

    def fill(self, halo: jax.Array, line: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(halo, line, 1, self.pixel_axis)

    def neighbours(self, halo: jax.Array) -> list[jax.Array]:
        """What is at the pixel of smaller index, the same, and larger index on the line in `halo`."""
        size = halo.shape[self.pixel_axis] - 2
        return [lax.slice_in_dim(halo, start, start + size, axis=self.pixel_axis) for start in range(3)]


def spread(w: jax.Array, channels: int) -> jax.Array:
    """Weights (..., C_w) for every channel: channel c uses weight channel c // (C / C_w)."""
    weight_channels = w.shape[-1]
    return w if weight_channels in (1, channels) else jnp.repeat(w, channels // weight_channels, axis=-1)


def gathered(products: jax.Array, weight_channels: int) -> jax.Array:
    """The transpose of `spread`: (..., C) summed over the channels that share a weight."""
    channels = products.shape[-1]
    if weight_channels == channels:
        return products
    return products.reshape(*products.shape[:-1], weight_channels, channels // weight_channels).sum(-1)
