"""The kernels as implementations of the operations: what they cannot address is padded, shared weights are laid out.

TMA wants 16-byte steps between pixels: C is rounded up to a multiple of 8 (4 in float32). Weights that all channels
share, or 8, 16, ... of them, stay as they are; those that another number shares are repeated for each channel. A map of
fewer than 8 channels and several images is scanned as one image with all their channels, which moves less.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.directions import DIRECTIONS, neighbour_axis, walked_axis
from pallas_kernels.mosaic import line_scan, primitives, propagation
from pallas_kernels.mosaic.card import planned_for
from pallas_kernels.mosaic.tiles import Tile, Work, plan
from pallas_kernels.sharding import vary_alike
from pallas_kernels.walk import spread

_UNIT = 8  # channels: the least channel block
_FLOAT32 = jax.ShapeDtypeStruct((), jnp.float32)  # y while directions add to it


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions that `gradient` asks of an implementation.

    Attributes:
      interpret: run by Pallas' interpreter, which raises RuntimeError if it saw a race.
    """

    interpret: bool = False

    def scan_forward(
        self, x, weights, lam, direction: str, chunk: int | None, *, from_logits: bool, tile: Tile | None = None
    ) -> jax.Array:
        """h of `line_scan`, or of `line_scan_from_logits`: (B, H, W, C) in x's dtype."""

        def scan(x, weights, lam):
            form = Form("forward", x, weights, (x, lam), (x,), direction, chunk, tile, self.interpret)
            arrays = form.map(x), form.weights(weights), form.map(lam)
            return form.map_back(self._scan(line_scan.scan_forward, form, from_logits, *arrays))

        return _folded(scan)(x, weights, lam)

    def scan_backward(
        self, x, weights, lam, h, grad_h, direction: str, chunk: int | None, *, from_logits: bool,
        tile: Tile | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Gradients of x, weights (or logits) and lam, each in its own dtype."""

        def scan(x, weights, lam, h, grad_h):
            loads, stores = (x, lam, grad_h, h), (x, lam)
            form = Form("backward", x, weights, loads, stores, direction, chunk, tile, self.interpret)
            arrays = form.map(x), form.weights(weights), form.map(lam), form.map(h), form.map(grad_h)
            grad_x, grad_weights, grad_lam = self._scan(line_scan.scan_backward, form, from_logits, *arrays)
            return form.map_back(grad_x), form.weights_back(grad_weights), form.map_back(grad_lam)

        return _folded(scan)(x, weights, lam, h, grad_h)

    def propagation_forward(
        self, x, logits, lam, gate, skip, merge, chunk: int | None, keep: bool
    ) -> tuple[jax.Array, tuple]:
        """y of the aligned `propagate`, and the four h; without them, and without writing them, where not `keep`."""

        def run(x, logits, lam, gate, merge, *skip):
            forms = forms_of_propagation("forward", x, logits, lam, gate, *skip, chunk=chunk, interpret=self.interpret)
            padded = [forms[0].map(array) for array in (x, lam, gate, *skip)]

            def kernels(logits, merge, x, lam, gate, *skip):
                return propagation.propagate_forward(
                    x, _each(logits), lam, gate, skip[0] if skip else None, merge,
                    chunk=chunk, keep=keep, tiles=[form.tile for form in forms], interpret=self.interpret,
                )  # fmt: skip

            y, states = self._run(kernels, _logits(forms, logits), merge, *padded)
            return [forms[0].map_back(array) for array in (y, *states)]

        y, *states = _folded(run)(x, logits, lam, gate, _for_each_image(merge, x), *([] if skip is None else [skip]))
        return y, tuple(states)

    def propagation_backward(self, x, logits, lam, gate, skip, merge, h, grad_y, chunk: int | None) -> tuple:
        """Gradients of x, logits, lam, gate, skip (None where skip is) and merge, each in its own dtype."""

        def run(x, logits, lam, gate, merge, grad_y, *others):
            h, skip = others[:4], others[4:]
            forms = forms_of_propagation("backward", x, logits, lam, gate, *skip, chunk=chunk, interpret=self.interpret)
            padded = [forms[0].map(array) for array in (x, grad_y, lam, gate, *h, *skip)]

            def kernels(logits, merge, x, grad_y, lam, gate, *others):
                h, skip = others[:4], others[4:]
                return propagation.propagate_backward(
                    x, _each(logits), lam, gate, skip[0] if skip else None, merge, h, grad_y,
                    chunk=chunk, tiles=[form.tile for form in forms], interpret=self.interpret,
                )  # fmt: skip

            grad_x, of_logits, of_maps, of_merge = self._run(kernels, _logits(forms, logits), merge, *padded)
            if forms[0].is_shared:
                parts = [form.weights_back(grad) for form, grad in zip(forms, of_logits, strict=True)]
                grad_logits = jnp.stack(parts, axis=3)
            else:
                grad_logits = forms[0].weights_back(of_logits[0]).reshape(logits.shape)
            return [forms[0].map_back(grad_x), grad_logits, of_merge, *(forms[0].map_back(grad) for grad in of_maps)]

        arrays = (x, logits, lam, gate, _for_each_image(merge, x), grad_y, *h, *([] if skip is None else [skip]))
        grad_x, grad_logits, of_merge, *of_maps = _folded(run)(*arrays)
        of_maps += [None] if skip is None else []
        return grad_x, grad_logits, *of_maps, jnp.sum(of_merge, axis=0).astype(merge.dtype)

    def _scan(self, kernel, form: "Form", from_logits: bool, *arrays: jax.Array):
        function = functools.partial(
            kernel, direction=form.direction, chunk=form.chunk, from_logits=from_logits, tile=form.tile,
            interpret=self.interpret,
        )  # fmt: skip
        return self._run(function, *arrays)

    def _run(self, function, *arrays):
        """`function`, which launches kernels, of trees of arrays."""
        results = (primitives.interpreted if self.interpret else primitives.on_device)(function, *arrays)
        leaves, structure = jax.tree.flatten(results)
        return jax.tree.unflatten(structure, vary_alike(*leaves, *jax.tree.leaves(arrays))[: len(leaves)])


class Form:
    """Arrays of an operation in the form that the kernels take, and the way back.

    Attributes:
      work: what the kernel does, as its tile depends on it.
      tile: how it does it.
    """

    def __init__(
        self, kernel, x, weights, loads, stores, direction, chunk, tile, interpret, *, may_fold=True, least_channels=0
    ):
        self.batch, self.channels, self.weight_channels = x.shape[0], x.shape[-1], weights.shape[-1]
        self.direction, self.chunk, axis = direction, chunk, walked_axis(direction)
        self.weight_dtype = weights.dtype
        sharing = self.channels // self.weight_channels
        # Weights are laid out for sharing where whole channel blocks share one; else there is one for each channel.
        self.is_shared = sharing > 1 and (self.weight_channels == 1 or sharing % _UNIT == 0)
        self.folds = may_fold and sharing == 1 and self.channels < _UNIT and self.batch > 1

        least = min(array.dtype.itemsize for array in (*loads, *([] if self.is_shared else [weights])))
        channels = self.channels * (self.batch if self.folds else 1)
        self.padded = -(-channels // _UNIT) * _UNIT if least < 4 or self.is_shared else -(-channels // 4) * 4
        self.padded = max(self.padded, least_channels)
        each = () if self.is_shared else (3 * weights.dtype.itemsize,)
        lines, self.length = x.shape[axis], x.shape[neighbour_axis(direction)]

        def work_of(channels: int) -> Work:
            return Work(
                kernel=kernel,
                batch=1 if self.folds else self.batch,
                lines=lines,
                length=self.length,
                channels=channels,
                chunk=min(chunk or lines, lines),
                loads=(*each, *(array.dtype.itemsize for array in loads)),
                stores=(*(each if kernel == "backward" else ()), *(array.dtype.itemsize for array in stores)),
                sharing=channels // self.weight_channels if self.is_shared else 1,
                adjacent=axis == 1 or x.shape[2] == 1,
            )

        # A channel block of fewer than all channels is clipped at the end of a line; one of all is not always.
        works = [work_of(channels) for channels in (self.padded, self.padded + _UNIT)]
        card = planned_for()
        if tile is not None:
            works = [work for work in works if work.fits(tile, card)]
            if not works:
                raise ValueError(f"tile: expected one that serves the {kernel} scan of x {x.shape}, got {tile!r}")
            if tile.warpgroups > (most := _most_warpgroups(interpret)):
                raise ValueError(f"tile: the interpreter runs at most {most} warpgroups here, got {tile!r}")
        planned = ((work, tile or plan(work, card, _most_warpgroups(interpret))) for work in works)
        work, chosen = next(((work, chosen) for work, chosen in planned if chosen is not None), (works[0], None))
        if chosen is None:
            raise ValueError(f"x: expected a map that a tile serves on {card.name}, got {x.shape} of {x.dtype.name}")
        self.padded, self.work, self.tile = work.channels, work, chosen

    def map(self, array: jax.Array) -> jax.Array:
        """(B, H, W, ..., C) with the kernels' batch and channels."""
        if self.folds:
            array = jnp.moveaxis(array, 0, -2)[None]
            array = array.reshape(*array.shape[:-2], -1)
        missing = self.padded - array.shape[-1]
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array

    def map_back(self, array: jax.Array) -> jax.Array:
        """The inverse of `map`."""
        array = array[..., : self.channels * (self.batch if self.folds else 1)]
        if self.folds:
            array = array.reshape(*array.shape[1:-1], self.batch, self.channels)
            array = jnp.moveaxis(array, -2, 0)
        return array

    def weights(self, weights: jax.Array) -> jax.Array:
        """(B, H, W, 3, C_w) in one of the two forms of `line_scan`."""
        if not self.is_shared:
            return self.map(spread(weights, self.channels) if self.weight_channels < self.channels else weights)
        # (B, lines, C_w, 4, pixels), the pixels a multiple of 16 bytes.
        axis = walked_axis(self.direction)
        weights = weights.astype(jnp.float32).transpose((0, axis, 4, 3, 3 - axis))
        return jnp.pad(weights, [(0, 0)] * 3 + [(0, 1), (0, -weights.shape[-1] % 4)])

    def weights_back(self, grads: jax.Array) -> jax.Array:
        """The gradient of `weights`: summed over the channels that share one."""
        if not self.is_shared:
            grads = self.map_back(grads)
            if self.weight_channels < self.channels:
                grads = grads.reshape(*grads.shape[:-1], self.weight_channels, -1).astype(jnp.float32).sum(-1)
            return grads.astype(self.weight_dtype)
        # (B, lines, channel blocks, 4, pixels) to (B, H, W, 3, C_w). Blocks of padding hold zeros.
        batch, lines, blocks, _, _ = grads.shape
        grads = grads[:, :, :, :3, : self.length].reshape(batch, lines, self.weight_channels, -1, 3, self.length).sum(3)
        axes = (0, 1, 4, 3, 2) if walked_axis(self.direction) == 1 else (0, 4, 1, 3, 2)
        return grads.transpose(axes).astype(self.weight_dtype)


def forms_of_propagation(kernel: str, x, logits, lam, gate, *skip, chunk, interpret: bool) -> list["Form"]:
    """Of the four directions, "forward" or "backward", with the same channels: one may need more than another."""
    maps = (lam, gate, *skip)
    if kernel == "forward":
        loads, stores = (x, *maps, _FLOAT32), (_FLOAT32, x)
    else:
        loads, stores = (x, x, x, *maps, _FLOAT32, x), (_FLOAT32, *maps)  # with grad_y, h and h of the line before

    def forms(least_channels):
        return [
            Form(kernel, x, logits, loads, stores, direction, chunk, None, interpret, may_fold=False,
                 least_channels=least_channels)
            for direction in DIRECTIONS
        ]  # fmt: skip

    return forms(max(form.padded for form in forms(0)))


def _logits(forms: list["Form"], logits: jax.Array) -> list[jax.Array]:
    """(B, H, W, 4, 3, C_w) for the kernels: one array for each direction that shares weights, else one for all."""
    if forms[0].is_shared:
        return [form.weights(logits[:, :, :, d]) for d, form in enumerate(forms)]
    return [forms[0].weights(logits.reshape(*logits.shape[:3], 12, logits.shape[-1]))]


def _each(logits: list[jax.Array]) -> list[jax.Array]:
    return logits if len(logits) > 1 else logits * len(DIRECTIONS)


def _for_each_image(merge: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(merge.astype(jnp.float32), (x.shape[0], len(DIRECTIONS)))


def _folded(function):
    """`function` of arrays (B, ...) and with such results, so that `jax.vmap` makes a larger batch of the new axis."""
    function = custom_vmap(function)

    @function.def_vmap
    def _(size, is_mapped, *arrays):
        merged = (
            (array if mapped else jnp.broadcast_to(array, (size, *array.shape))).reshape(-1, *array.shape[1 + mapped :])
            for array, mapped in zip(arrays, is_mapped, strict=True)
        )
        results = function(*merged)
        split = jax.tree.map(lambda result: result.reshape(size, -1, *result.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return function


def _most_warpgroups(interpret: bool) -> int:
    """The interpreter blocks a thread of XLA's pool for each warpgroup: with too many it would wait for ever."""
    if not interpret:
        return 4
    return max(1, max(os.cpu_count() or 1, len(jax.local_devices(backend="cpu"))) // 2)
