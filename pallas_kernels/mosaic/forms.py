"""Arrays in the layout that the kernels read: channels are padded for TMA, shared weights get a layout of their own.

TMA needs pixels at multiples of 16 bytes, so C is rounded up to a multiple of 8 (4 in float32). Weights shared by all
channels, or by a multiple of 8 of them, stay shared; other shared weights are repeated for each channel. Several images
of fewer than 8 channels are scanned as one image with the channels of all, which moves fewer bytes.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.directions import DIRECTIONS, neighbour_axis, walked_axis
from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.card import planned_for
from pallas_kernels.mosaic.maps import Given, Made
from pallas_kernels.mosaic.tiles import MAPS, ScanWork, Tile, lines_of_product, plan, rows_of_product
from pallas_kernels.walk import spread

_UNIT = 8  # channels of the smallest channel block
_FLOAT32 = jax.ShapeDtypeStruct((), jnp.float32)  # y, while the directions add to it
_ON_CHIP = 4  # bytes per pixel and channel that y takes in shared memory, beside x


class Form:
    """Converts the arrays of one scan to the kernels' layout and back.

    Attributes:
        work: the properties of the scan that decide its tile.
        tile: the kernel's tile.
    """

    def __init__(
        self, kernel, x, weights, loads, stores, direction, chunk, tile, interpret, *, may_fold=True, least_channels=0,
        rank=0, resident=0,
    ):  # fmt: skip
        self.batch, self.channels, self.weight_channels = x.shape[0], x.shape[-1], weights.shape[-1]
        self.direction, self.chunk, axis = direction, chunk, walked_axis(direction)
        self.weight_dtype = weights.dtype
        sharing = self.channels // self.weight_channels
        # Weights stay shared if whole channel blocks share one; else each channel gets its own.
        self.is_shared = sharing > 1 and (self.weight_channels == 1 or sharing % _UNIT == 0)
        self.folds = may_fold and sharing == 1 and self.channels < _UNIT and self.batch > 1

        least = min(array.dtype.itemsize for array in (*loads, *([] if self.is_shared else [weights])))
        channels = self.channels * (self.batch if self.folds else 1)
        self.padded = -(-channels // _UNIT) * _UNIT if least < 4 or self.is_shared else -(-channels // 4) * 4
        self.padded = max(self.padded, least_channels)
        each = () if self.is_shared else (3 * weights.dtype.itemsize,)
        lines, self.length = x.shape[axis], x.shape[neighbour_axis(direction)]
        # A kernel that walks all four directions has one tile, as long as the map's longer side.
        walked = max(lines, self.length) if resident else min(chunk or lines, lines)

        def work_of(channels: int) -> ScanWork:
            return ScanWork(
                kernel=kernel,
                batch=1 if self.folds else self.batch,
                lines=min(lines, self.length) if resident else lines,
                length=max(lines, self.length) if resident else self.length,
                channels=channels,
                chunk=walked,
                loads=(*(() if rank else each), *(array.dtype.itemsize for array in loads)),
                stores=(*(each if kernel == "backward" else ()), *(array.dtype.itemsize for array in stores)),
                sharing=channels // self.weight_channels if self.is_shared else 1,
                adjacent=axis == 1 or x.shape[2] == 1 or bool(resident),
                rank=rank,
                resident=resident,
            )

        # A store of all channels may be contiguous and then is not clipped at the end of a line; with another channel
        # block beside it, it is always clipped.
        works = [work_of(channels) for channels in (self.padded, self.padded + _UNIT)]
        card = planned_for()
        variant = ("low_rank" if rank else "fused") + ("_on_chip" if resident else "")
        if rank and not card.multiplies:
            raise ValueError(f"variant: expected one without wgmma, which {card.name} lacks, got {variant!r}")
        if tile is not None:
            works = [work for work in works if work.fits(tile, card)]
            if not works:
                raise ValueError(f"tile: expected one that fits the {kernel} scan of x {x.shape}, got {tile!r}")
            if tile.warpgroups > (most := _most_warpgroups(interpret)):
                raise ValueError(f"tile: expected at most {most} warpgroups in the interpreter, got {tile!r}")
        planned = ((work, tile or plan(work, card, _most_warpgroups(interpret))) for work in works)
        work, chosen = next(((work, chosen) for work, chosen in planned if chosen is not None), (works[0], None))
        if chosen is None and (rank or resident):
            of_x, of_rank = f"x {x.shape} {x.dtype.name}", f", proxy of {rank} channels" if rank else ""
            raise ValueError(f"variant: expected one that fits {card.name} and {of_x}{of_rank}, got {variant!r}")
        if chosen is None:
            raise ValueError(f"x: expected a map that some tile fits on {card.name}, got {x.shape} {x.dtype.name}")
        self.padded, self.work, self.tile = work.channels, work, chosen

    def map(self, array: jax.Array) -> jax.Array:
        """(B, H, W, ..., C) with the channels padded, or (1, H, W, ..., padded B*C) where images are folded."""
        if self.folds:
            array = jnp.moveaxis(array, 0, -2)[None]  # (1, H, W, ..., B, C)
            array = array.reshape(*array.shape[:-2], -1)
        missing = self.padded - array.shape[-1]
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array

    def map_back(self, array: jax.Array) -> jax.Array:
        """The inverse of `map`."""
        array = array[..., : self.channels * (self.batch if self.folds else 1)]
        if self.folds:
            array = array.reshape(*array.shape[1:-1], self.batch, self.channels)  # (H, W, ..., B, C)
            array = jnp.moveaxis(array, -2, 0)
        return array

    def weights(self, weights: jax.Array) -> jax.Array:
        """(B, H, W, 3, C_w) in one of the two forms that `mosaic.weights` describes."""
        if not self.is_shared:
            return self.map(spread(weights, self.channels) if self.weight_channels < self.channels else weights)
        # To (B, lines, C_w, 4, pixels), where the pixels take a multiple of 16 bytes.
        axis = walked_axis(self.direction)
        weights = weights.astype(jnp.float32).transpose((0, axis, 4, 3, 3 - axis))
        return jnp.pad(weights, [(0, 0)] * 3 + [(0, 1), (0, -weights.shape[-1] % 4)])

    def weights_back(self, grads: jax.Array) -> jax.Array:
        """The gradient of weights (B, H, W, 3, C_w) from the kernel's: summed over channels that share a weight."""
        if not self.is_shared:
            grads = self.map_back(grads)
            if self.weight_channels < self.channels:
                grads = grads.reshape(*grads.shape[:-1], self.weight_channels, -1).astype(jnp.float32).sum(-1)
            return grads.astype(self.weight_dtype)
        # (B, lines, channel blocks, 4, pixels) to (B, H, W, 3, C_w). Blocks of padded channels hold zeros.
        batch, lines, blocks, _, _ = grads.shape
        grads = grads[:, :, :, :3, : self.length].reshape(batch, lines, self.weight_channels, -1, 3, self.length).sum(3)
        axes = (0, 1, 4, 3, 2) if walked_axis(self.direction) == 1 else (0, 4, 1, 3, 2)
        return grads.transpose(axes).astype(self.weight_dtype)


class GivenForms:
    """Converts the arrays of a propagation whose maps are in memory to the kernels' layout and back.

    Attributes:
        chunk: lines after which the scans restart, or None.
        forms: for each direction.
        tiles: for each direction; all the same in a kernel that walks all four.
    """

    def __init__(self, kernel: str, x, logits, lam, gate, *skip, chunk: int | None, on_chip: bool, interpret: bool):
        self.chunk, self._shape = chunk, logits.shape
        self.forms = _four_forms(kernel, x, logits, (lam, gate, *skip), chunk, on_chip, interpret)
        self.tiles = [form.tile for form in self.forms]
        self.map, self.map_back = self.forms[0].map, self.forms[0].map_back

    def arrays(self, logits, lam, gate, *skip) -> tuple:
        """The logits, one array per direction if they are shared, else one for all four; and lam, gate and skip."""
        if self.forms[0].is_shared:
            parts = [form.weights(logits[:, :, :, d]) for d, form in enumerate(self.forms)]
        else:
            parts = [self.forms[0].weights(logits.reshape(*logits.shape[:3], 12, logits.shape[-1]))]  # 4, 3 to 12
        return parts, [self.map(array) for array in (lam, gate, *skip)]

    def maps(self, arrays: tuple) -> list[Given]:
        """The kernels' maps of each direction, from the result of `arrays`."""
        logits, (lam, gate, *skip) = arrays
        each = logits if len(logits) > 1 else logits * len(DIRECTIONS)
        return [Given(array, lam, gate, *(skip or [None])) for array in each]

    def logits_back(self, grads: list[jax.Array]) -> jax.Array:
        """The gradient of logits, (B, H, W, 4, 3, C_w)."""
        if self.forms[0].is_shared:
            parts = [form.weights_back(grad) for form, grad in zip(self.forms, grads, strict=True)]
            return jnp.stack(parts, axis=3)
        return self.forms[0].weights_back(grads[0]).reshape(self._shape)


class MadeForms:
    """As `GivenForms`, for maps that the kernels make from a proxy (B, H, W, S) and `up`."""

    def __init__(self, kernel: str, x, proxy, up, *, chunk: int | None, on_chip: bool, interpret: bool):
        self.chunk, self._up, self._channels = chunk, up, x.shape[-1]
        self._has_skip, self._rank = up[-1] is not None, primitives.round_up(proxy.shape[-1], 16)
        like = jax.ShapeDtypeStruct(x.shape, proxy.dtype)
        self.forms = _four_forms(
            kernel, x, like, (like,) * (2 + self._has_skip), chunk, on_chip, interpret, rank=self._rank
        )
        self.tiles = [form.tile for form in self.forms]
        self.map, self.map_back = self.forms[0].map, self.forms[0].map_back

    def arrays(self, proxy: jax.Array) -> tuple:
        """The proxy in the order of each walked axis (W, H), and the columns of `up` for each direction."""
        return [self._proxy(proxy, form) for form in self.forms[:2]], [
            self._columns(d, form.tile) for d, form in enumerate(self.forms)
        ]

    def maps(self, arrays: tuple) -> list[Made]:
        """The kernels' maps of each direction, from the result of `arrays`."""
        proxies, columns = arrays
        return [
            Made(proxies[d % 2], self._pitch(form), columns[d], self._has_skip) for d, form in enumerate(self.forms)
        ]

    def logits_back(self, grads: list[jax.Array]) -> jax.Array:
        """The gradient of logits for each channel, (B, H, W, 4, 3, C)."""
        grad = self.map_back(grads[0])
        return grad.reshape(*grad.shape[:3], 4, 3, -1)

    def _pitch(self, form: "Form") -> int:
        # Where one matrix product makes several lines, they are as close as in its tile.
        return form.tile.rows if lines_of_product(form.tile) > 1 else primitives.round_up(form.length, 8)

    def _proxy(self, proxy: jax.Array, form: "Form") -> jax.Array:
        """The array `maps.Made.proxy`."""
        if walked_axis(form.direction) == 2:
            proxy = proxy.swapaxes(1, 2)  # (B, lines, pixels, S)
        batch, lines, length, rank = proxy.shape
        pitch = self._pitch(form)
        proxy = jnp.pad(proxy, [(0, 0), (0, 0), (0, pitch - length), (0, self._rank - rank)])
        # A product that begins at the last line or pixel reads beyond it.
        proxy = proxy.reshape(batch, lines * pitch, self._rank)
        return jnp.pad(proxy, [(0, 0), (0, rows_of_product(form.tile) + form.tile.extent), (0, 0)])

    def _columns(self, direction: int, tile: Tile) -> jax.Array:
        """The array `maps.Made.up`."""
        each: Any = (None if array is None else array[:, direction] for array in self._up)
        logits, *maps = each
        logits = jnp.repeat(logits, self._channels // logits.shape[-1], axis=-1)
        maps = [jnp.zeros_like(logits[:, 0]) if array is None else array for array in maps]
        columns = jnp.concatenate([logits, jnp.stack(maps, axis=1)], axis=1)  # (S, 6, C)
        missing = -columns.shape[-1] % tile.channels
        columns = jnp.pad(columns, [(0, self._rank - columns.shape[0]), (0, 0), (0, missing)])
        columns = columns.reshape(self._rank, MAPS, -1, tile.channels).swapaxes(1, 2)  # (S, blocks, 6, channels)
        return columns.reshape(self._rank, -1)


def _four_forms(
    kernel: str, x, logits, maps, chunk: int | None, on_chip: bool, interpret: bool, rank: int = 0
) -> list["Form"]:
    """The forms of the four directions, for a "forward" or "backward" kernel.

    All get the same number of channels; one direction may need more padding than another.
    """
    made = () if rank else maps
    if on_chip:
        loads, stores, resident = made, (x, x), _ON_CHIP + x.dtype.itemsize  # y and h
    elif kernel == "forward":
        loads, stores, resident = (x, *made, _FLOAT32), (_FLOAT32, x), 0
    else:  # reads also grad_y, h and h of the line before
        loads, stores, resident = (x, x, x, *made, _FLOAT32, x), (_FLOAT32, *maps), 0

    def forms(least_channels):
        return [
            Form(kernel, x, logits, loads, stores, direction, chunk, None, interpret, may_fold=False,
                 least_channels=least_channels, rank=rank, resident=resident)
            for direction in DIRECTIONS
        ]  # fmt: skip

    return forms(max(form.padded for form in forms(0)))


def _most_warpgroups(interpret: bool) -> int:
    """The most warpgroups that a kernel may have.

    The interpreter blocks a thread of XLA's pool for each warpgroup; with too many it would wait forever.
    """
    if not interpret:
        return 4
    return max(1, max(os.cpu_count() or 1, len(jax.local_devices(backend="cpu"))) // 2)
