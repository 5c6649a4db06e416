"""The line scan, forward and backward, as Mosaic GPU kernels (equation 1 of GSPN and its gradient).

Both are limited by memory: each input is read once and each result written once. In bfloat16 with logits the forward
kernel moves 12 bytes per pixel and channel, the backward kernel 24.

C is a multiple of 16 bytes. The weights, or the logits, come in one of two forms:
  per channel: (B, H, W, 3, C), float32 or any dtype of logits;
  shared: (B, lines, C_w, 4, pixels) float32, channel c using weight channel c // (C / C_w). `lines` is the axis that
    the scan walks, `pixels` the other, rounded up to 16 bytes; slot 3 is padding, so that a TMA copy has enough bytes.
    A channel block lies within one weight channel, and its weights are made once for all of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import normalisation, primitives
from pallas_kernels.mosaic.pipeline import Pipeline, StateLines
from pallas_kernels.mosaic.tiles import Tile

SLOTS = 3
SHARED_SLOTS = 4


class Weights:
    """The weights of a tile, from either form, and the way back of their gradients."""

    def __init__(self, walk: Pipeline, array: jax.Array, from_logits: bool, direction: int = 0):
        """`direction`: of an array (B, H, W, 12, C), three slots for each direction, the one that is meant."""
        self.walk, self.from_logits, self.dtype = walk, from_logits, array.dtype
        self.slots = pl.ds(SLOTS * direction, SLOTS)
        self.rows, self.channels = walk.tile.rows, walk.tile.channels
        self.is_shared = array.shape[3] == SHARED_SLOTS
        self.sharing = walk.channels // (array.shape[2] if self.is_shared else array.shape[4])
        self.tile = (SHARED_SLOTS, self.rows) if self.is_shared else (self.rows, SLOTS, self.channels)

    def fetch(self, ref, target, n, barrier) -> None:
        walk = self.walk
        if self.is_shared:
            channel = lax.div(walk.block_index * self.channels, self.sharing)
            source = ref.at[walk.image, walk.line(n), channel, :, walk.rows()]
        else:
            source = walk.at(ref, walk.line(n), walk.rows(), self.slots)
        primitives.fetch(source, target, barrier)

    def read(self, ref: Any):
        """Weights as (rows, channels) tiles from what `fetch` brought, and what `gradients` needs."""
        if self.is_shared:
            return self.weights([primitives.load_pixels(ref.at[k], self.channels) for k in range(SLOTS)])
        return self.weights([primitives.load(ref.at[:, k]) for k in range(SLOTS)])

    def weights(self, given: list[jax.Array]):
        """As `read`, from what was given in registers: (rows, channels) tiles, or (rows,) where they are shared."""
        numbers = primitives.pixel_numbers if self.is_shared else primitives.pixels
        pixel = self.walk.pixel + numbers(self.rows, self.channels)
        weights, kept = given, None
        if self.from_logits:
            parts, factor = normalisation.shares(given)
            weights = normalisation.weights(parts, pixel, self.walk.length)
            kept = [given, parts, factor, weights]
        if self.is_shared:
            weights = [primitives.spread(weight, self.channels) for weight in weights]
        return weights, kept

    def gradients(self, grads, kept):
        """Gradients of what came in, from those of the weights; of shared weights summed over the channel block."""
        if self.is_shared:
            grads = [jnp.sum(grad, axis=1) for grad in grads]
        return normalisation.pass_to_logits(*kept, grads) if self.from_logits else grads  # pyright: ignore

    def write(self, ref, grads) -> None:
        for k, grad in enumerate(grads):
            ref[(k, slice(None)) if self.is_shared else (slice(None), k)] = grad.astype(self.dtype)

    def gradient_like(self, array: jax.Array) -> jax.ShapeDtypeStruct:
        """What the backward kernel writes: of shared weights a part for each channel block, to be summed."""
        if not self.is_shared:
            return jax.ShapeDtypeStruct(array.shape, array.dtype)
        walk, tile = self.walk, self.walk.tile
        pixels = max(array.shape[4], walk.segments * tile.own if tile.ghost else 0)
        return jax.ShapeDtypeStruct((walk.batch, walk.lines, walk.blocks, SHARED_SLOTS, pixels), jnp.float32)

    def store(self, source, ref, n) -> None:
        walk, tile = self.walk, self.walk.tile
        if not self.is_shared:
            walk.store(source, ref, n, self.slots)
        elif tile.ghost:
            own = pl.ds(walk.segment * tile.own, tile.own)
            for k in range(SLOTS):
                target = ref.at[walk.image, walk.line(n), walk.block_index, k, own]
                primitives.store(source.at[k, pl.ds(walk.offset, tile.own)], target)
        else:
            primitives.store(source, ref.at[walk.image, walk.line(n), walk.block_index, :, walk.rows()])


def scan_forward(
    x: jax.Array,
    weights: jax.Array,
    lam: jax.Array,
    direction: str,
    chunk: int | None,
    *,
    from_logits: bool,
    tile: Tile,
    interpret: bool = False,
) -> jax.Array:
    """h of `line_scan`: (B, H, W, C) in x's dtype."""
    walk = Pipeline(x.shape, direction, chunk, tile, reverse=False)
    state, mix = StateLines(walk, 1), Weights(walk, weights, from_logits)
    rows, channels, warpgroups = tile.rows, tile.channels, tile.warpgroups

    def body(launch, x_ref, lam_ref, w_ref, given, h_ref, passed, x_in, lam_in, w_in, out, lines, arrived, joint):
        walk.enter(launch)
        own = walk.warpgroup

        def load(n, slot):
            barrier = arrived.at[own * walk.stages + slot]
            for ref, ring in ((x_ref, x_in), (lam_ref, lam_in)):
                primitives.fetch(walk.at(ref, walk.line(n), walk.rows()), ring.at[own, slot], barrier)
            mix.fetch(w_ref, w_in.at[own, slot], n, barrier)

        def compute(n, slot, out_slot, now, same):
            w, _ = mix.read(w_in.at[own, slot])
            smaller, larger = (primitives.load(lines.at[now, 0, state.rows(shift)]) for shift in (-1, 1))
            gated = primitives.load(lam_in.at[own, slot]) * primitives.load(x_in.at[own, slot])
            h = w[1] * same + (w[0] * smaller + w[2] * larger) + gated
            lines[1 - now, 0, state.rows()] = h
            out[own, out_slot] = h.astype(out.dtype)
            return h

        def store(n, out_slot):
            walk.store(out.at[own, out_slot], h_ref, n)

        state.clear(lines, joint)
        same = primitives.zeros(rows, channels)
        if tile.ghost:
            state.receive(lines, given, [(0, 0)], joint)
            same = primitives.load(lines.at[0, 0, state.rows()])
        walk.walk(load, compute, store, arrived, joint, same)
        if tile.ghost:
            state.send(lines, [(lax.rem(walk.count, 2), 0)], passed)
        primitives.wait_written()

    memory = primitives.shared_memory
    scratch = [
        memory((warpgroups, walk.stages, rows, channels), x.dtype),
        memory((warpgroups, walk.stages, rows, channels), lam.dtype),
        memory((warpgroups, walk.stages, *mix.tile), weights.dtype),
        memory((warpgroups, tile.stores, rows, channels), x.dtype),
        state.scratch,
        primitives.barriers(3, warpgroups * walk.stages),
        primitives.barriers(1 if tile.ghost else warpgroups),
    ]
    h = primitives.Blank(x.shape, x.dtype, interpret)
    walk.run("line_scan_forward", body, (x, lam, weights), [h], 1, scratch, interpret)
    return h[...]


def scan_backward(
    x: jax.Array,
    weights: jax.Array,
    lam: jax.Array,
    h: jax.Array,
    grad_h: jax.Array,
    direction: str,
    chunk: int | None,
    *,
    from_logits: bool,
    tile: Tile,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, of the weights or logits, and of lam, each in its own dtype.

    With g the gradient that reaches h, summed over the lines that read it,

        g[i, j] = grad_h[i, j] + sum_k weights[i + 1, j - k, k] g[i + 1, j - k]

    grad_x = lam g, grad_lam = x g, grad_weights[k] = g h[i - 1, j + k]. The state is not g but the products that it
    passes on: each weight is then read once, where it lies, and its logits are normalised once.

    Of shared weights the gradient is (B, lines, C / channel block, 4, pixels) float32: the part of each channel block,
    slot 3 without meaning.
    """
    walk = Pipeline(x.shape, direction, chunk, tile, reverse=True)
    state, mix = StateLines(walk, 2), Weights(walk, weights, from_logits)
    rows, channels, warpgroups = tile.rows, tile.channels, tile.warpgroups
    margin = primitives.margin(channels, h.dtype)

    def body(launch, *refs):
        x_ref, lam_ref, w_ref, h_ref, grad_ref, given, grad_x, grad_w, grad_lam, passed, *scratch = refs
        x_in, lam_in, w_in, grad_in, h_in, x_out, w_out, lam_out, lines, arrived, joint = scratch
        walk.enter(launch)
        own = walk.warpgroup

        def load(n, slot):
            barrier = arrived.at[own * walk.stages + slot]
            for ref, ring in ((x_ref, x_in), (lam_ref, lam_in), (grad_ref, grad_in)):
                primitives.fetch(walk.at(ref, walk.line(n), walk.rows()), ring.at[own, slot], barrier)
            mix.fetch(w_ref, w_in.at[own, slot], n, barrier)
            walk.fetch_before(h_ref, h_in.at[own, slot], n, margin, barrier)

        def compute(n, slot, out_slot, now, same):
            w, kept = mix.read(w_in.at[own, slot])
            g = primitives.load(grad_in.at[own, slot]) + same
            g += primitives.load(lines.at[now, 0, state.rows(1)]) + primitives.load(lines.at[now, 1, state.rows(-1)])
            lines[1 - now, 0, state.rows()] = w[0] * g
            lines[1 - now, 1, state.rows()] = w[2] * g

            before = walk.before(h_in.at[own, slot], margin)
            mix.write(w_out.at[own, out_slot], mix.gradients([g * neighbour for neighbour in before], kept))
            x_out[own, out_slot] = (primitives.load(lam_in.at[own, slot]) * g).astype(x.dtype)
            lam_out[own, out_slot] = (primitives.load(x_in.at[own, slot]) * g).astype(lam.dtype)
            return w[1] * g

        def store(n, out_slot):
            walk.store(x_out.at[own, out_slot], grad_x, n)
            mix.store(w_out.at[own, out_slot], grad_w, n)
            walk.store(lam_out.at[own, out_slot], grad_lam, n)

        state.clear(lines, joint)
        same = primitives.zeros(rows, channels)
        if tile.ghost:
            state.receive(lines, given, [(0, 0), (0, 1), (1, 0)], joint)
            same = primitives.load(lines.at[1, 0, state.rows()])
            primitives.commit()  # all have read it before the first line writes there
        same = walk.walk(load, compute, store, arrived, joint, same)
        if tile.ghost:
            last = lax.rem(walk.count, 2)
            lines[1 - last, 0, state.rows()] = same
            state.send(lines, [(last, 0), (last, 1), (1 - last, 0)], passed)
        primitives.wait_written()

    memory = primitives.shared_memory
    ring, results = (warpgroups, walk.stages), (warpgroups, tile.stores)
    scratch = [
        memory((*ring, rows, channels), x.dtype),
        memory((*ring, rows, channels), lam.dtype),
        memory((*ring, *mix.tile), weights.dtype),
        memory((*ring, rows, channels), grad_h.dtype),
        memory((*ring, rows + 3 * margin, channels), h.dtype),
        memory((*results, rows, channels), x.dtype),
        memory((*results, *mix.tile), weights.dtype),
        memory((*results, rows, channels), lam.dtype),
        state.scratch,
        primitives.barriers(5, warpgroups * walk.stages),
        primitives.barriers(3 if tile.ghost else warpgroups),
    ]
    grads = [primitives.Blank(a.shape, a.dtype, interpret) for a in (x, mix.gradient_like(weights), lam)]
    walk.run("line_scan_backward", body, (x, lam, weights, h, grad_h), grads, 3, scratch, interpret)
    return grads[0][...], grads[1][...], grads[2][...]
