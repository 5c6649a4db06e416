"""The kernels as implementations of the operations: what they cannot address is padded, shared weights are laid out.

TMA wants 16-byte steps between pixels: C is rounded up to a multiple of 8 (4 in float32). A map of fewer than 8
channels and several images is scanned as one image with all their channels, which moves less.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.directions import DIRECTIONS, neighbour_axis, walked_axis
from pallas_kernels.mosaic import line_scan, primitives
from pallas_kernels.mosaic.card import planned_for
from pallas_kernels.mosaic.tiles import Tile, Work, plan
from pallas_kernels.sharding import vary_alike
from pallas_kernels.walk import spread

_UNIT = 8  # channels: the least channel block


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
            return form.map_back(self._run(line_scan.scan_forward, form, from_logits, *arrays))

        return _folded(scan)(x, weights, lam)

    def scan_backward(
        self, x, weights, lam, h, grad_h, direction: str, chunk: int | None, *, from_logits: bool,
        tile: Tile | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Gradients of x, weights (or logits) and lam, each in its own dtype."""

        def scan(x, weights, lam, h, grad_h):
            loads, stores = (x, lam, h, grad_h), (x, lam)
            form = Form("backward", x, weights, loads, stores, direction, chunk, tile, self.interpret)
            arrays = form.map(x), form.weights(weights), form.map(lam), form.map(h), form.map(grad_h)
            grad_x, grad_weights, grad_lam = self._run(line_scan.scan_backward, form, from_logits, *arrays)
            return form.map_back(grad_x), form.weights_back(grad_weights), form.map_back(grad_lam)

        return _folded(scan)(x, weights, lam, h, grad_h)

    def propagation_forward(self, x, logits, lam, gate, skip, merge, chunk: int | None) -> tuple[jax.Array, tuple]:
        """y of the aligned `propagate`, and the four h: a scan kernel for each direction, the rest in XLA."""
        y, states = jnp.zeros(x.shape, jnp.float32), []
        for d, direction in enumerate(DIRECTIONS):
            h = self.scan_forward(x, logits[:, :, :, d], lam[:, :, :, d], direction, chunk, from_logits=True)
            part = gate[:, :, :, d].astype(jnp.float32) * h.astype(jnp.float32)
            if skip is not None:
                part = part + skip[:, :, :, d].astype(jnp.float32) * x.astype(jnp.float32)
            y = y + merge[d].astype(jnp.float32) * part
            states.append(h)
        return y.astype(x.dtype), tuple(states)

    def propagation_backward(self, x, logits, lam, gate, skip, merge, h, grad_y, chunk: int | None) -> tuple:
        """Gradients of x, logits, lam, gate, skip (None where skip is) and merge, each in its own dtype."""
        wide_x, wide_grad = x.astype(jnp.float32), grad_y.astype(jnp.float32)
        grad_x, of_slots = jnp.zeros(x.shape, jnp.float32), []
        for d, direction in enumerate(DIRECTIONS):
            wide_gate, wide_h = gate[:, :, :, d].astype(jnp.float32), h[d].astype(jnp.float32)
            scaled = merge[d].astype(jnp.float32) * wide_grad
            # float32: what reaches h is rounded once, when its results are.
            to_x, to_logits, to_lam = self.scan_backward(
                wide_x, logits[:, :, :, d], lam[:, :, :, d], h[d], scaled * wide_gate, direction, chunk,
                from_logits=True,
            )  # fmt: skip
            part = wide_gate * wide_h
            to_skip = None
            if skip is not None:
                wide_skip = skip[:, :, :, d].astype(jnp.float32)
                part, to_x = part + wide_skip * wide_x, to_x + wide_skip * scaled
                to_skip = (wide_x * scaled).astype(skip.dtype)
            grad_x = grad_x + to_x
            of_slots.append(
                (to_logits, to_lam, (wide_h * scaled).astype(gate.dtype), to_skip, jnp.sum(wide_grad * part))
            )
        *maps, of_merge = zip(*of_slots, strict=True)
        grads = [None if skip is None and k == 3 else jnp.stack(slots, axis=3) for k, slots in enumerate(maps)]
        return grad_x.astype(x.dtype), *grads, jnp.stack(of_merge).astype(merge.dtype)

    def _run(self, kernel, form: "Form", from_logits: bool, *arrays: jax.Array):
        function = functools.partial(
            kernel, direction=form.direction, chunk=form.chunk, from_logits=from_logits, tile=form.tile,
            interpret=self.interpret,
        )  # fmt: skip
        results = (primitives.interpreted if self.interpret else primitives.on_device)(function, *arrays)
        leaves, structure = jax.tree.flatten(results)
        return jax.tree.unflatten(structure, vary_alike(*leaves, *arrays)[: len(leaves)])


class Form:
    """Arrays of an operation in the form that the kernels take, and the way back.

    Attributes:
      work: what the kernel does, as its tile depends on it.
      tile: how it does it.
    """

    def __init__(self, kernel, x, weights, loads, stores, direction, chunk, tile, interpret):
        self.batch, self.channels, self.weight_channels = x.shape[0], x.shape[-1], weights.shape[-1]
        self.direction, self.chunk, axis = direction, chunk, walked_axis(direction)
        self.weight_dtype = weights.dtype
        sharing = self.channels // self.weight_channels
        # Weights are laid out for sharing where whole channel blocks share one; else there is one for each channel.
        self.is_shared = sharing > 1 and (self.weight_channels == 1 or sharing % _UNIT == 0)
        self.folds = sharing == 1 and self.channels < _UNIT and self.batch > 1

        least = min(array.dtype.itemsize for array in (*loads, *([] if self.is_shared else [weights])))
        channels = self.channels * (self.batch if self.folds else 1)
        self.padded = -(-channels // _UNIT) * _UNIT if least < 4 or self.is_shared else -(-channels // 4) * 4
        each = 0 if self.is_shared else 3 * weights.dtype.itemsize
        lines, self.length = x.shape[axis], x.shape[neighbour_axis(direction)]

        def work_of(channels: int) -> Work:
            return Work(
                kernel=kernel,
                batch=1 if self.folds else self.batch,
                lines=lines,
                length=self.length,
                channels=channels,
                chunk=min(chunk or lines, lines),
                loads=sum(array.dtype.itemsize for array in loads) + each,
                stores=sum(array.dtype.itemsize for array in stores) + (each if kernel == "backward" else 0),
                sharing=channels // self.weight_channels if self.is_shared else 1,
                adjacent=axis == 1 or x.shape[2] == 1,
            )

        # A channel block of fewer than all channels is clipped at the end of a line; one of all is not always.
        works = [work_of(channels) for channels in (self.padded, self.padded + _UNIT)]
        card = planned_for()
        if tile is not None:
            works = [work for work in works if work.fits(tile, card)]
            if not works:
                raise ValueError(f"tile: expected one that serves the {kernel} scan of x {x.shape}, got {tile}")
        planned = ((work, tile or plan(work, card, _most_warpgroups(interpret))) for work in works)
        work, chosen = next((work, chosen) for work, chosen in planned if chosen is not None)
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
