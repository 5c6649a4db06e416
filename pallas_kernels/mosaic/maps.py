"""The maps of a propagation inside a kernel: loaded from memory, or made by tensor cores from a low-rank proxy.

Both sources give the weights, lam, gate and skip of one direction for a tile of a line.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.pipeline import Pipeline
from pallas_kernels.mosaic.tiles import MAPS, SKEW, lines_of_product, overlaps, products_ahead, rows_of_product
from pallas_kernels.mosaic.weights import SLOTS, Weights


class Read(NamedTuple):
    """A (rows, channels) tile of each map, float32."""

    weights: list[jax.Array]
    kept: Any  # values that `Weights.gradients` needs
    lam: jax.Array
    gate: jax.Array
    skip: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Given:
    """Maps in memory.

    Attributes:
        logits: in one of the two forms of `mosaic.weights`.
        lam: (B, H, W, 4, C).
        gate: (B, H, W, 4, C).
        skip: (B, H, W, 4, C) or None.
    """

    logits: jax.Array
    lam: jax.Array
    gate: jax.Array
    skip: jax.Array | None

    def of(self, walk: Pipeline, slot: int, *, one_direction: bool) -> "GivenMaps":
        """The maps of direction `slot` in a kernel that walks only this direction, or all four."""
        return GivenMaps(self, walk, slot)


@dataclasses.dataclass(frozen=True)
class Made:
    """Maps that a kernel makes as proxy @ up, in a 16-bit dtype.

    Attributes:
        proxy: (B, lines * pitch + rest, S). The lines that the scan walks follow each other, each padded with zeros to
            `pitch` pixels; `rest` are zeros as far as a product may reach. S is a multiple of 16.
        pitch: pixels from one line of the proxy to the next.
        up: (S, blocks * 6 * channels of a tile): for each channel block its columns of the three logits, lam, gate and
            skip.
        has_skip: False if the columns of skip are only zeros.
    """

    proxy: jax.Array
    pitch: int
    up: jax.Array
    has_skip: bool

    def of(self, walk: Pipeline, slot: int, *, one_direction: bool) -> "MadeMaps":
        """The maps of direction `slot` in a kernel that walks only this direction, or all four."""
        return MadeMaps(self, walk, slot, one_direction)


class GivenMaps:
    """One direction of `Given` in a kernel: each line is copied together with the kernel's other arrays.

    Attributes:
        inputs: arrays that the kernel reads.
        copies: TMA copies for a line, which arrive at the barrier passed to `fetch`.
        scratch: shared memory and barriers.
        mix: turns logits into weights.
        gradients: shapes of the gradients that a backward kernel writes: of logits, lam, gate and, if given, skip.
    """

    def __init__(self, maps: Given, walk: Pipeline, slot: int):
        tile = walk.tile
        self.walk, self.slot = walk, slot
        self.mix = Weights(walk, maps.logits, True, slot)
        of_direction = [array for array in (maps.lam, maps.gate, maps.skip) if array is not None]
        self.has_skip = maps.skip is not None
        self.inputs = [maps.logits, *of_direction]
        self.copies = len(self.inputs)
        ring = tile.warpgroups, walk.stages
        self.scratch = [
            primitives.shared_memory((*ring, *self.mix.tile), maps.logits.dtype),
            *(primitives.shared_memory((*ring, tile.rows, tile.channels), array.dtype) for array in of_direction),
        ]
        self.gradients = [self.mix.gradient_like(maps.logits), *of_direction]

    def enter(self, inputs: Sequence[Any], scratch: Sequence[Any]) -> None:
        """Takes the refs of `inputs` and `scratch`; called after the walk's `enter`."""
        self._refs, self._rings = inputs, scratch

    def start(self) -> None:
        """Starts copies, before the first line of the kernel."""

    def prepare(self) -> None:
        """Runs before the first line of the direction."""

    def during(self, n: Any, compute: Callable[[], Any]) -> Any:
        """compute(), the arithmetic of line n, whose maps have been read."""
        return compute()

    def follow(self, before: "GivenMaps") -> None:
        """Tells that the same kernel walks this direction after another one."""

    def fetch(self, n: Any, at: Any, barrier: Any) -> None:
        """Starts the copies of line n into slot `at`."""
        walk, own = self.walk, self.walk.warpgroup
        self.mix.fetch(self._refs[0], self._rings[0].at[own, at], n, barrier)
        for ref, ring in zip(self._refs[1:], self._rings[1:], strict=True):
            primitives.fetch(walk.at(ref, walk.line(n), walk.rows(), self.slot), ring.at[own, at], barrier)

    def read(self, n: Any, at: Any) -> Read:
        """The maps of line n, which are in slot `at`."""
        weights, kept = self.mix.read(self._rings[0].at[self.walk.warpgroup, at])
        lam, gate, *skip = (primitives.load(ring.at[self.walk.warpgroup, at]) for ring in self._rings[1:])
        return Read(weights, kept, lam, gate, *(skip or [None]))


class MadeMaps:
    """One direction of `Made` in a kernel; attributes as in `GivenMaps`.

    Tensor cores work on 64 pixels: one matrix product makes the maps of several lines if they are shorter. Maps are
    rounded to 16 bits, as maps in memory are, and stay in shared memory until the next product. If a product makes one
    line and the kernel walks one direction, tensor cores make the next line's maps during the arithmetic of each line.
    """

    def __init__(self, maps: Made, walk: Pipeline, slot: int, one_direction: bool):
        tile, dtype, rank = walk.tile, maps.proxy.dtype, maps.proxy.shape[-1]
        self.walk, self.slot, self.maps = walk, slot, maps
        pixels = walk.shape[:3]
        like: Any = jax.ShapeDtypeStruct((*pixels, 4 * SLOTS, walk.channels), dtype)
        self.mix = Weights(walk, like, True, slot)
        self.has_skip, self.copies = maps.has_skip, 0
        self.inputs = [maps.proxy, maps.up]
        self.columns = MAPS * tile.channels
        self.lines, self.rows = lines_of_product(tile), rows_of_product(tile)
        self.overlaps = overlaps(tile, one_direction)
        # No more than the products of any direction, since a kernel may walk all four with the same buffers.
        self.stages = min(products_ahead(tile), -(-min(walk.lines, walk.length) // self.lines))
        swizzle = primitives.common_swizzle(rank, self.columns)
        self.scratch = [
            primitives.factor(self.rows, rank, swizzle, dtype, tile.warpgroups * self.stages),
            primitives.factor(rank, self.columns, swizzle, dtype, 1),
            primitives.shared_memory((tile.warpgroups, 1 + self.overlaps, self.rows, self.columns + SKEW), dtype),
            primitives.barriers(1, tile.warpgroups * self.stages),
            primitives.barriers(1),
        ]
        of_direction = jax.ShapeDtypeStruct((*pixels, 4, walk.channels), dtype)
        self.gradients = [like, *[of_direction] * (2 + maps.has_skip)]
        self._before, self._following = 0, None  # see `follow`

    def enter(self, inputs: Sequence[Any], scratch: Sequence[Any]) -> None:
        """Takes the refs of `inputs` and `scratch`; called after the walk's `enter`."""
        walk = self.walk
        self._proxy, self._up = inputs
        self._proxies, self._columns, self._maps, self._arrived, self._up_arrived = scratch
        # Products are numbered in the order of the walk, which may run towards smaller lines.
        self._sign = -1 if walk.back != walk.reverse else 1
        self._first = self._product(0)
        last = self._product(jnp.maximum(walk.count - 1, 0))
        self.products = jnp.where(walk.count > 0, self._sign * (last - self._first) + 1, 0)

    def start(self) -> None:
        """Starts copies, before the first line of the kernel."""
        pl.when(self.walk.warpgroup == 0)(self._fetch_up)
        for k in range(self.stages):
            pl.when(k < self.products)(lambda k=k: self._fetch(k))

    def prepare(self) -> None:
        """Waits for `up`; if products overlap with the arithmetic, makes the first line's maps."""
        primitives.wait(self._up_arrived)
        if self.overlaps:

            def first():
                primitives.wait(self._arrived.at[self._slot(0)])
                self._multiply(0)
                primitives.commit()

            pl.when(self.products > 0)(first)

    def during(self, n: Any, compute: Callable[[], Any]) -> Any:
        """compute(), the arithmetic of line n, while tensor cores make the maps of line n + 1."""
        if not self.overlaps:
            return compute()

        # The slots are free: the line before used them and ended with `commit`.
        pl.when(n + self.stages < self.products)(lambda: self._fetch(n + self.stages))
        pl.when(n + 1 < self.products)(lambda: primitives.wait(self._arrived.at[self._slot(n + 1)]))
        # At the last line the product multiplies an old slot, and nothing reads its result.
        return self._multiply(n + 1, compute)

    def follow(self, before: "MadeMaps") -> None:
        """Tells that the same kernel walks this direction after `before`, which starts this one's first copies."""
        self._before = before._before + before.products
        before._following = self

    def fetch(self, n: Any, at: Any, barrier: Any) -> None:
        """Copies nothing: the proxy is copied for each product, not for each line."""

    def read(self, n: Any, at: Any) -> Read:
        """The maps of line n. Lines are read in order, and the first line of a product makes it."""
        walk, rows, channels = self.walk, self.walk.tile.rows, self.walk.tile.channels
        product = self._product(n)
        k = self._sign * (product - self._first)
        if not self.overlaps:
            is_first = (n == 0) | (product != self._product(n - 1))
            pl.when((self.lines == 1) | is_first)(lambda: self._make(k))
        pixels = pl.ds((walk.line(n) - product * self.lines) * rows, rows)
        maps = self._maps.at[walk.warpgroup, self._buffer(k), pixels]
        tiles = [primitives.load(maps.at[:, pl.ds(k * channels, channels)], is_part=True) for k in range(MAPS)]
        weights, kept = self.mix.weights(tiles[:SLOTS])
        lam, gate, skip = tiles[SLOTS:]
        return Read(weights, kept, lam, gate, skip if self.has_skip else None)

    def _product(self, n: Any) -> Any:
        """The index along the image of the product that makes line n."""
        return lax.div(self.walk.line(n), self.lines)

    def _slot(self, k: Any) -> Any:
        return self.walk.warpgroup * self.stages + lax.rem(self._before + k, self.stages)

    def _fetch_up(self) -> None:
        columns = pl.ds(self.walk.block_index * self.columns, self.columns)
        primitives.fetch(self._up.at[:, columns], self._columns.at[0], self._up_arrived)

    def _fetch(self, k: Any) -> None:
        """Starts the copy of the proxy for the k-th product."""
        start = (self._first + self._sign * k) * (self.lines * self.maps.pitch) + self.walk.pixel
        source = self._proxy.at[self.walk.image, pl.ds(start, self.rows)]
        primitives.fetch(source, self._proxies.at[self._slot(k)], self._arrived.at[self._slot(k)])

    def _buffer(self, k: Any) -> Any:
        return lax.rem(k, 2) if self.overlaps else 0

    def _multiply(self, k: Any, meanwhile: Callable[[], Any] = lambda: None) -> Any:
        maps = self._maps.at[self.walk.warpgroup, self._buffer(k), :, pl.ds(0, self.columns)]
        return primitives.multiply(self._proxies.at[self._slot(k)], self._columns.at[0], maps, meanwhile)

    def _make(self, k: Any) -> None:
        slot, ahead = self._slot(k), k + self.stages
        primitives.wait(self._arrived.at[slot])
        self._multiply(k)  # safe: the line before ended with `commit`, so all threads have read the old maps
        primitives.commit()  # now all threads see the maps, and the proxy's slot may be overwritten
        pl.when(ahead < self.products)(lambda: self._fetch(ahead))
        following = self._following
        if following is not None:
            pl.when(ahead >= self.products)(lambda: following._fetch(ahead - self.products))
            pl.when(k == self.products - 1)(following._fetch_up)
