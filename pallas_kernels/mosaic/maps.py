"""The maps inside a kernel: loaded from memory, or made by tensor cores from a low-rank proxy.

Both sources give the maps of the line that a CTA walks: `Loaded` the weights and lam of a line scan, `Made` gate and
skip besides.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.frame import Frame
from pallas_kernels.mosaic.tiles import MAPS, SKEW, lines_of_product, overlaps, products_ahead, rows_of_product
from pallas_kernels.mosaic.weights import SLOTS, Weights


class Line(NamedTuple):
    """The maps of a tile of a line; each is a (rows, channels) tile, float32."""

    weights: Callable[[], tuple[list[jax.Array], Any]]  # computes the three weights, and what `Weights.gradients` needs
    lam: jax.Array
    gate: jax.Array | None = None  # None in a line scan
    skip: jax.Array | None = None


class Loaded:
    """Maps in memory, of which a line is copied together with the kernel's other arrays.

    Attributes:
        inputs: arrays that the kernel reads, by name.
        copies: TMA copies for a line, which arrive at the barrier passed to `fetch`.
        scratch: shared memory and barriers, by name.
        weights: turns logits into weights.
        gradients: shapes of the gradients of the maps, by name.
    """

    def __init__(self, frame: Frame, weights: jax.Array, lam: jax.Array, from_logits: bool):
        """Takes the arrays: the weights or logits in a form of `mosaic.weights`, and lam, (B, H, W, D, C)."""
        tile = frame.tile
        self.frame, self.weights = frame, Weights(frame, weights, from_logits)
        self.inputs, self.copies = dict(weights=weights, lam=lam), 2
        ring = tile.warpgroups, frame.stages
        self.scratch = dict(
            weights=primitives.shared_memory((*ring, *self.weights.tile), weights.dtype),
            lam=primitives.shared_memory((*ring, tile.rows, tile.channels), lam.dtype),
        )
        self.gradients = dict(
            weights=self.weights.gradient_like(weights), lam=jax.ShapeDtypeStruct(lam.shape, lam.dtype)
        )

    def enter(self, refs: Mapping[str, Any], scratch: Mapping[str, Any]) -> None:
        """Takes the kernel's refs; called after the frame's `enter`."""
        self._refs, self._rings = refs, scratch

    def start(self) -> None:
        """Starts copies, before the first line."""

    def prepare(self) -> None:
        """Runs before the first line."""

    def fetch(self, axis: int, n: Any, at: Any, barrier: Any) -> None:
        """Starts the copies of line n into slot `at`."""
        frame, own = self.frame, self.frame.warpgroup
        self.weights.fetch(self._refs["weights"], self._rings["weights"].at[own, at], axis, n, barrier)
        frame.fetch(self._refs["lam"], self._rings["lam"].at[own, at], axis, n, barrier, part=frame.slot)

    def during(self, n: Any, at: Any, compute: Callable[[Line], Any]) -> Any:
        """compute(maps), the arithmetic of line n, whose maps are in slot `at`."""
        weights, lam = (self._rings[name].at[self.frame.warpgroup, at] for name in ("weights", "lam"))
        return compute(Line(lambda: self.weights.read(weights), primitives.load(lam)))


class Made:
    """Maps that a kernel makes as proxy @ up, in a 16-bit dtype; attributes as in `Loaded`.

    Tensor cores work on 64 pixels: one matrix product makes the maps of several lines if they are shorter. Maps are
    rounded to 16 bits, as maps in memory are, and stay in shared memory until the next product. If a product makes one
    line and a CTA walks one direction, tensor cores make the next line's maps during the arithmetic of each line.
    """

    def __init__(
        self, frame: Frame, proxies: Sequence[jax.Array], pitches: Sequence[int], up: jax.Array, has_skip: bool,
        on_chip: bool,
    ):  # fmt: skip
        """Takes the arrays.

        Args:
            frame: the kernel's walk.
            proxies: for each of the frame's axes (B, lines * pitch + rest, S). The lines that the scan walks follow
                each other, each padded with zeros to `pitch` pixels; `rest` are zeros as far as a product may reach. S
                is a multiple of 16.
            pitches: pixels from one line of a proxy to the next.
            up: (S, 4 * blocks * 6 * channels of a tile): for each direction and channel block its columns of
                the three logits, lam, gate and skip.
            has_skip: False if the columns of skip are only zeros.
            on_chip: whether a CTA walks all directions.
        """
        tile, dtype, rank = frame.tile, up.dtype, up.shape[0]
        self.frame, self.has_skip, self.pitches, self.copies = frame, has_skip, pitches, 0
        like = jax.ShapeDtypeStruct((*frame.shape[:3], 4 * SLOTS, frame.channels), dtype)
        self.weights = Weights(frame, like, True)
        self.inputs = {f"proxy{axis}": proxy for axis, proxy in zip(frame.axes, proxies, strict=True)} | dict(up=up)
        self.columns = MAPS * tile.channels
        self.lines_of_product, self.rows = lines_of_product(tile), rows_of_product(tile)
        self.overlaps = overlaps(tile, on_chip)
        # On chip all directions have the same buffers, which no direction may outrun.
        lines = min(frame.shape[1:3]) if on_chip else frame.group
        self.stages = min(products_ahead(tile), -(-lines // self.lines_of_product))
        swizzle = primitives.common_swizzle(rank, self.columns)
        self.scratch = dict(
            proxies=primitives.factor(self.rows, rank, swizzle, dtype, tile.warpgroups * self.stages),
            columns=primitives.factor(rank, self.columns, swizzle, dtype, 1),
            maps=primitives.shared_memory((tile.warpgroups, 1 + self.overlaps, self.rows, self.columns + SKEW), dtype),
            proxies_arrived=primitives.barriers(1, tile.warpgroups * self.stages),
            columns_arrived=primitives.barriers(1),
        )
        each = jax.ShapeDtypeStruct((*frame.shape[:3], 4, frame.channels), dtype)
        self.gradients = dict(weights=like, lam=each, gate=each) | (dict(skip=each) if has_skip else {})
        self._before, self._following = 0, None  # see `follow`

    def enter(self, refs: Mapping[str, Any], scratch: Mapping[str, Any]) -> None:
        """Takes the kernel's refs; called after the frame's `enter`."""
        frame = self.frame
        self._refs, self._scratch = refs, scratch
        # Products are numbered in the order of the walk, which may run towards smaller lines.
        self._sign = jnp.where(jnp.not_equal(frame.back, frame.reverse), -1, 1)
        self._first = self._product(0)
        last = self._product(jnp.maximum(frame.count - 1, 0))
        self.products = jnp.where(frame.count > 0, self._sign * (last - self._first) + 1, 0)

    def start(self) -> None:
        """Starts copies, before the first line of the kernel."""
        pl.when(self.frame.warpgroup == 0)(self._fetch_columns)
        for k in range(self.stages):
            pl.when(k < self.products)(lambda k=k: self._fetch(k))

    def prepare(self) -> None:
        """Waits for `up`; if products overlap with the arithmetic, makes the first line's maps."""
        primitives.wait(self._scratch["columns_arrived"])
        if self.overlaps:

            def first():
                primitives.wait(self._arrived(0))
                self._multiply(0)
                primitives.commit()

            pl.when(self.products > 0)(first)

    def follow(self, before: "Made") -> None:
        """Tells that the same kernel walks this direction after `before`, which starts this one's first copies."""
        self._before = before._before + before.products
        before._following = self

    def fetch(self, axis: int, n: Any, at: Any, barrier: Any) -> None:
        """Copies nothing: the proxy is copied for each product, not for each line."""

    def during(self, n: Any, at: Any, compute: Callable[[Line], Any]) -> Any:
        """compute(maps), the arithmetic of line n. Lines come in order, and the first line of a product makes it.

        If products overlap with the arithmetic, tensor cores make the maps of line n + 1 meanwhile.
        """
        frame, rows, channels = self.frame, self.frame.tile.rows, self.frame.tile.channels
        product = self._product(n)
        k = self._sign * (product - self._first)
        if not self.overlaps:
            is_first = (n == 0) | (product != self._product(n - 1))
            pl.when((self.lines_of_product == 1) | is_first)(lambda: self._make(k))

        def arithmetic():
            pixels = pl.ds((frame.line(n) - product * self.lines_of_product) * rows, rows)
            maps = self._scratch["maps"].at[frame.warpgroup, self._buffer(k), pixels]

            def read(k, least=None):
                return primitives.load(maps.at[:, pl.ds(k * channels, channels)], is_part=True, least=least)

            weights = lambda: self.weights.weights([read(k, self.weights.least) for k in range(SLOTS)])  # noqa: E731
            return compute(Line(weights, read(SLOTS), read(SLOTS + 1), read(SLOTS + 2) if self.has_skip else None))

        if not self.overlaps:
            return arithmetic()
        # The slots are free: the line before used them and ended with `commit`.
        pl.when(n + self.stages < self.products)(lambda: self._fetch(n + self.stages))
        pl.when(n + 1 < self.products)(lambda: primitives.wait(self._arrived(n + 1)))
        # At the last line the product multiplies an old slot, and nothing reads its result.
        return self._multiply(n + 1, arithmetic)

    def _product(self, n: Any) -> Any:
        """The index along the image of the product that makes line n."""
        return lax.div(self.frame.line(n), self.lines_of_product)

    def _slot(self, k: Any) -> Any:
        return self.frame.warpgroup * self.stages + lax.rem(self._before + k, self.stages)

    def _arrived(self, k: Any) -> Any:
        return self._scratch["proxies_arrived"].at[self._slot(k)]

    def _fetch_columns(self) -> None:
        frame, columns = self.frame, self._scratch["columns"].at[0]
        place = pl.ds((frame.slot * frame.blocks + frame.block_index) * self.columns, self.columns)
        primitives.fetch(self._refs["up"].at[:, place], columns, self._scratch["columns_arrived"])

    def _fetch(self, k: Any) -> None:
        """Starts the copy of the proxy for the k-th product."""
        frame, pitches = self.frame, dict(zip(self.frame.axes, self.pitches, strict=True))

        def copy(axis):
            start = (self._first + self._sign * k) * (self.lines_of_product * pitches[axis]) + frame.pixel
            source = self._refs[f"proxy{axis}"].at[frame.image, pl.ds(start, self.rows)]
            primitives.fetch(source, self._scratch["proxies"].at[self._slot(k)], self._arrived(k))

        frame.by_axis(copy)

    def _buffer(self, k: Any) -> Any:
        return lax.rem(k, 2) if self.overlaps else 0

    def _multiply(self, k: Any, meanwhile: Callable[[], Any] = lambda: None) -> Any:
        maps = self._scratch["maps"].at[self.frame.warpgroup, self._buffer(k), :, pl.ds(0, self.columns)]
        proxy, columns = self._scratch["proxies"].at[self._slot(k)], self._scratch["columns"].at[0]
        return primitives.multiply(proxy, columns, maps, meanwhile)

    def _make(self, k: Any) -> None:
        ahead = k + self.stages
        primitives.wait(self._arrived(k))
        self._multiply(k)  # safe: the line before ended with `commit`, so all threads have read the old maps
        primitives.commit()  # now all threads see the maps, and the proxy's slot may be overwritten
        pl.when(ahead < self.products)(lambda: self._fetch(ahead))
        following = self._following
        if following is not None:
            pl.when(ahead >= self.products)(lambda: following._fetch(ahead - self.products))
            pl.when(k == self.products - 1)(following._fetch_columns)
