"""Arrays in the layout that the kernels read: channels are padded for TMA, shared weights get a layout of their own.

TMA needs pixels at multiples of 16 bytes, so C is rounded up to a multiple of 8 (4 in float32). Weights shared by all
channels, or by a multiple of 8 of them, stay shared; other shared weights are repeated for each channel. Several images
of fewer than 8 channels are scanned as one image with the channels of all, which moves fewer bytes.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.directions import neighbour_axis, walked_axis
from pallas_kernels.mosaic import plans, primitives
from pallas_kernels.mosaic.card import planned_for
from pallas_kernels.mosaic.frame import Frame, launches_of
from pallas_kernels.mosaic.tiles import Problem, Tile, lines_of_product, rows_of_product
from pallas_kernels.up_projection import UpProjection
from pallas_kernels.walk import gathered, spread

_UNIT = 8  # channels of the smallest channel block


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kernel, and the bytes of each value that it copies for a pixel and channel.

    Attributes:
        kernel: "forward" or "backward".
        loads: of arrays that it reads; in a backward kernel h comes last.
        stores: of arrays that it writes.
        weights: of the logits or weights in memory; 0 where the kernel makes them.
        rank: channels of the proxy, from which the kernel makes maps; 0 where it does not.
        resident: of x and y in shared memory, where a CTA walks all directions; else 0.
    """

    kernel: str
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    weights: int = 0
    rank: int = 0
    resident: int = 0


def scan_kind(kernel: str, x: Any, weights: Any, lam: Any) -> Kind:
    """The kernel of a line scan of arrays with these dtypes."""
    of_x, of_lam = x.dtype.itemsize, lam.dtype.itemsize
    if kernel == "forward":
        return Kind(kernel, (of_x, of_lam), (of_x,), weights.dtype.itemsize)
    return Kind(kernel, (of_x, of_lam, of_x, of_x), (of_x, of_lam), weights.dtype.itemsize)


def low_rank_kind(kernel: str, x: Any, rank: int, *, keep: bool = True, on_chip: bool = False) -> Kind:
    """The kernel of a propagation whose maps it makes in 16 bits; `keep` says whether a forward kernel writes h."""
    rank, of_x = primitives.round_up(rank, 16), x.dtype.itemsize
    if kernel == "backward":
        return Kind(kernel, (of_x,) * 4, (of_x, 2, 2, 2, 6), rank=rank)
    return Kind(kernel, () if on_chip else (of_x,), (of_x,) * (1 + keep), rank=rank, resident=(4 + of_x) * on_chip)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays of an operation lie in memory, and how its launches are tiled.

    Attributes:
        kernel: "forward" or "backward".
        shape: (B, H, W, C) of x.
        weight_channels: C_w.
        directions: that the operation walks.
        chunk: lines after which the scans restart, or None.
        is_shared: whether weights stay shared by channels.
        folds: whether images become channels of one image.
        padded: channels of an array in memory.
        launches: for each launch the indices of its directions, its problem and its tile.
        on_chip: whether a CTA walks all directions.
    """

    kernel: str
    shape: tuple[int, ...]
    weight_channels: int
    directions: tuple[str, ...]
    chunk: int | None
    is_shared: bool
    folds: bool
    padded: int
    launches: tuple[tuple[tuple[int, ...], Problem, Tile], ...]
    on_chip: bool = False

    def frames(self) -> list[Frame]:
        """The frame of each launch; on chip that of each direction."""
        shape = (1 if self.folds else self.shape[0], *self.shape[1:3], self.padded)
        launches = [(slots, tile) for slots, _, tile in self.launches]
        if self.on_chip:
            launches = [((slot,), tile) for slots, tile in launches for slot in slots]
        return [
            Frame(shape, [self.directions[slot] for slot in slots], slots, self.chunk, tile, self.kernel == "backward")
            for slots, tile in launches
        ]

    def states(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """An array (B, D, H, W, C) in memory."""
        batch, height, width, _ = self.shape
        shape = (1 if self.folds else batch, len(self.directions), height, width, self.padded)
        return jax.ShapeDtypeStruct(shape, dtype)

    def map(self, array: jax.Array) -> jax.Array:
        """(B, ..., C) with the channels padded, or (1, ..., padded B*C) where images are folded."""
        if self.folds:
            array = jnp.moveaxis(array, 0, -2)[None]  # (1, ..., B, C)
            array = array.reshape(*array.shape[:-2], -1)
        missing = self.padded - array.shape[-1]
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array

    def map_back(self, array: jax.Array) -> jax.Array:
        """The inverse of `map`."""
        batch, channels = self.shape[0], self.shape[-1]
        array = array[..., : channels * (batch if self.folds else 1)]
        if self.folds:
            array = jnp.moveaxis(array.reshape(*array.shape[1:-1], batch, channels), -2, 0)
        return array

    def weights(self, weights: jax.Array) -> list[jax.Array]:
        """(B, H, W, D, 3, C_w) in one of the two forms that `mosaic.weights` describes, for each launch."""
        if not self.is_shared:
            # D and 3 become one axis: TMA has five.
            weights = spread(weights, self.shape[-1]) if self.weight_channels < self.shape[-1] else weights
            return [self.map(weights.reshape(*weights.shape[:3], -1, weights.shape[-1]))] * len(self.launches)
        return [self._shared(weights, slots) for slots, _, _ in self.launches]

    def weights_back(self, grads: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """The gradient of weights (B, H, W, D, 3, C_w) from the last launch's, or from each launch's if shared."""
        if not self.is_shared:
            grad = self.map_back(grads[-1])
            grad = grad.reshape(*grad.shape[:3], -1, 3, grad.shape[-1])
            return gathered(grad.astype(jnp.float32), self.weight_channels).astype(dtype)
        found: dict[int, jax.Array] = {}
        for (slots, _, _), grad in zip(self.launches, grads, strict=True):
            length = self.shape[neighbour_axis(self.directions[slots[0]])]
            # (B * D, lines, channel blocks, 4, pixels). Blocks of padded channels hold zeros.
            grad = grad[..., :3, :length].reshape(
                self.shape[0], len(slots), grad.shape[1], self.weight_channels, -1, 3, length
            )
            for k, slot in enumerate(slots):
                one = grad[:, k].sum(3)  # (B, lines, C_w, 3, pixels)
                found[slot] = one.transpose((0, 1, 4, 3, 2) if self._walks_rows(slot) else (0, 4, 1, 3, 2))
        return jnp.stack([found[slot] for slot in sorted(found)], axis=3).astype(dtype)

    def proxies(self, proxy: jax.Array, frame: Frame) -> tuple[list[jax.Array], list[int]]:
        """The arrays and pitches that `maps.Made` takes, of (B, H, W, S)."""
        made = [self._proxy(proxy, axis, frame.tile) for axis in frame.axes]
        return [array for array, _ in made], [pitch for _, pitch in made]

    def columns(self, up: UpProjection, tile: Tile) -> jax.Array:
        """The array `up` that `maps.Made` takes."""
        rank = up.logits.shape[0]
        logits = jnp.repeat(up.logits, self.shape[-1] // self.weight_channels, axis=-1)  # (S, 4, 3, C)
        maps = [jnp.zeros_like(logits[:, :, 0]) if array is None else array for array in up[1:]]
        columns = jnp.concatenate([logits, jnp.stack(maps, axis=2)], axis=2)  # (S, 4, 6, C)
        missing = -columns.shape[-1] % tile.channels
        columns = jnp.pad(columns, [(0, -rank % 16), (0, 0), (0, 0), (0, missing)])
        columns = columns.reshape(*columns.shape[:3], -1, tile.channels).swapaxes(2, 3)  # (S, 4, blocks, 6, channels)
        return columns.reshape(columns.shape[0], -1)

    def _walks_rows(self, slot: int) -> bool:
        return walked_axis(self.directions[slot]) == 1

    def _shared(self, weights: jax.Array, slots: Sequence[int]) -> jax.Array:
        # Each direction to (B, lines, C_w, 3, pixels).
        each = [
            weights[:, :, :, slot].transpose((0, 1, 4, 3, 2) if self._walks_rows(slot) else (0, 2, 4, 3, 1))
            for slot in slots
        ]
        stacked = jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:]).astype(jnp.float32)
        return jnp.pad(stacked, [(0, 0)] * 3 + [(0, 1), (0, -stacked.shape[-1] % 4)])  # whole groups of 16 bytes

    def _proxy(self, proxy: jax.Array, axis: int, tile: Tile) -> tuple[jax.Array, int]:
        """The proxy as lines of the axis, and its pitch."""
        proxy = proxy.swapaxes(1, 2) if axis == 2 else proxy  # (B, lines, pixels, S)
        batch, lines, length, rank = proxy.shape
        # Where one matrix product makes several lines, they are as close as in its tile.
        pitch = tile.rows if lines_of_product(tile) > 1 else primitives.round_up(length, 8)
        proxy = jnp.pad(proxy, [(0, 0), (0, 0), (0, pitch - length), (0, -rank % 16)])
        proxy = proxy.reshape(batch, lines * pitch, -1)
        # A product that begins at the last line or pixel reads beyond it.
        return jnp.pad(proxy, [(0, 0), (0, rows_of_product(tile) + tile.extent), (0, 0)]), pitch


def lay_out(
    kind: Kind,
    shape: tuple[int, ...],
    weight_channels: int,
    directions: tuple[str, ...],
    chunk: int | None,
    *,
    interpret: bool,
    tile: Tile | None = None,
) -> Layout | None:
    """The layout of an operation, and the tiles of its launches; None where no tile fits, or `tile` does not.

    Args:
        kind: the kernel.
        shape: (B, H, W, C) of x.
        weight_channels: C_w.
        directions: that the operation walks.
        chunk: lines after which the scans restart, or None.
        interpret: whether the interpreter runs the kernels.
        tile: of every launch; None for the planned ones.
    """
    batch, height, width, channels = shape
    sharing = channels // weight_channels
    # Weights stay shared if whole channel blocks share one; else each channel gets its own.
    is_shared = not kind.rank and sharing > 1 and (weight_channels == 1 or sharing % _UNIT == 0)
    folds = not kind.rank and sharing == 1 and channels < _UNIT and batch > 1
    all_channels = channels * (batch if folds else 1)
    least = min(
        *kind.loads, *kind.stores, *([kind.weights] if kind.weights and not is_shared else [4]), 2 if kind.rank else 4
    )
    padded = primitives.round_up(all_channels, _UNIT if least < 4 or is_shared else 4)
    each = (3 * kind.weights,) if kind.weights and not is_shared else ()
    groups = [tuple(range(len(directions)))] if kind.resident else launches_of(directions, height, width)
    card, most_warpgroups = planned_for(), _most_warpgroups(interpret)
    if kind.rank and not card.multiplies:
        return None

    def problem(slots: Sequence[int], channels: int) -> Problem:
        sizes, walked = (height, width), {walked_axis(directions[slot]) for slot in slots}
        # A CTA that walks all four directions has one tile, as long as the map's longer side.
        lines = min(sizes) if kind.resident else sizes[min(walked) - 1]
        return Problem(
            kernel=kind.kernel,
            batch=1 if folds else batch,
            lines=lines,
            length=max(sizes) if kind.resident else sizes[2 - min(walked)],
            channels=channels,
            chunk=min(chunk or max(sizes), max(sizes) if kind.resident else lines),
            directions=len(slots),
            loads=(*each, *kind.loads),
            stores=(*kind.stores, *(each if kind.kernel == "backward" else ())),
            sharing=channels // weight_channels if is_shared else 1,
            adjacent=1 in walked or width == 1,
            rank=kind.rank,
            resident=kind.resident,
        )

    # A store of all channels may be contiguous and then is not clipped at the end of a line; with another channel block
    # beside it, it is always clipped.
    for channels in (padded, padded + _UNIT):
        launches = []
        for slots in groups:
            one = problem(slots, channels)
            if tile is None:
                chosen = plans.plan(one, card, most_warpgroups)
            else:
                chosen = tile if tile.warpgroups <= most_warpgroups and one.fits(tile, card) else None
            if chosen is None:
                break
            launches.append((slots, one, chosen))
        else:
            return Layout(
                kind.kernel, shape, weight_channels, directions, chunk, is_shared, folds, channels, tuple(launches),
                on_chip=bool(kind.resident),
            )  # fmt: skip
    return None


def _most_warpgroups(interpret: bool) -> int:
    """The most warpgroups that a kernel may have.

    The interpreter blocks a thread of XLA's pool for each warpgroup; with too many it would wait forever.
    """
    if not interpret:
        return 4
    return max(1, max(os.cpu_count() or 1, len(jax.local_devices(backend="cpu"))) // 2)
