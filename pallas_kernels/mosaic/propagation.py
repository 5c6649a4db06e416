"""Propagation, forward and backward, as Mosaic GPU kernels: four scans with normalisation, gate, skip and merge inside.

One launch for each direction, one after the other: each adds its share to y, so that no two CTAs update the same place
and results are the same from run to run. y is float32 until the last direction writes it in x's dtype. In bfloat16 the
forward kernels move 82 bytes per pixel and channel: four times x and 6 maps, and 26 for y; 90 with the four h, which
are written under differentiation alone. The backward kernels move 146: four times x, h, the gradient of y, 6 maps and
their gradients, and 26 for the gradient of x. Recomputing h instead would cost a forward pass, 40 bytes, against the 16
that writing and reading it takes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.line_scan import Weights
from pallas_kernels.mosaic.pipeline import Pipeline, StateLines
from pallas_kernels.mosaic.tiles import Tile


def propagate_forward(
    x: jax.Array,
    logits: Sequence[jax.Array],
    lam: jax.Array,
    gate: jax.Array,
    skip: jax.Array | None,
    merge: jax.Array,
    *,
    chunk: int | None,
    keep: bool,
    tiles: Sequence[Tile],
    interpret: bool,
) -> tuple[jax.Array, list[jax.Array]]:
    """y of `propagate`, and the four h in x's dtype, or none of them if they are not to be kept.

    Args:
      logits: for each direction, in a form of `line_scan`, or one (B, H, W, 12, C) for all of them four times.
      lam, gate, skip: (B, H, W, 4, C); skip may be None.
      merge: (B, 4) float32.
      tiles: for each direction.
    """
    y, states = None, []
    for d, direction in enumerate(DIRECTIONS):
        maps = Maps(x, logits[d], lam, gate, skip, merge)
        dtype = x.dtype if d == len(DIRECTIONS) - 1 else jnp.float32
        y, h = _direction_forward(
            maps, y, direction, d, chunk, dtype=dtype, keep=keep, tile=tiles[d], interpret=interpret
        )
        states += [] if h is None else [h]
    assert y is not None
    return y, states


def propagate_backward(
    x: jax.Array,
    logits: Sequence[jax.Array],
    lam: jax.Array,
    gate: jax.Array,
    skip: jax.Array | None,
    merge: jax.Array,
    h: Sequence[jax.Array],
    grad_y: jax.Array,
    *,
    chunk: int | None,
    tiles: Sequence[Tile],
    interpret: bool,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array], jax.Array]:
    """Gradients of x; of logits, an array for each different one that came; of lam, gate and skip; and of merge (B, 4).

    Arguments as in `propagate_forward`. The gradient of shared logits is in parts, as from `line_scan.scan_backward`.
    """
    grad_x, of_merge, of_logits = None, [], {}
    of_maps = [primitives.blank(a.shape, a.dtype, interpret) for a in (lam, gate, skip) if a is not None]
    for d, direction in enumerate(DIRECTIONS):
        maps = Maps(x, logits[d], lam, gate, skip, merge)
        if id(logits[d]) not in of_logits:
            walk = Pipeline(x.shape, direction, chunk, tiles[d], reverse=True)
            like = Weights(walk, logits[d], True).gradient_like(logits[d])
            of_logits[id(logits[d])] = primitives.blank(like.shape, like.dtype, interpret)
        dtype = x.dtype if d == len(DIRECTIONS) - 1 else jnp.float32
        grads = [of_logits[id(logits[d])], *of_maps]
        grad_x, sums = _direction_backward(
            maps, h[d], grad_y, grad_x, grads, direction, d, chunk, dtype=dtype, tile=tiles[d], interpret=interpret
        )
        of_merge.append(jnp.sum(sums, axis=(0, 2, 3, 4, 5)))
    assert grad_x is not None
    return grad_x, [ref[...] for ref in of_logits.values()], [ref[...] for ref in of_maps], jnp.stack(of_merge, axis=1)


@dataclasses.dataclass(frozen=True)
class Maps:
    """The inputs of one direction. `weights` in a form of `line_scan`, the maps (B, H, W, 4, C); `skip` may be None."""

    x: jax.Array
    logits: jax.Array
    lam: jax.Array
    gate: jax.Array
    skip: jax.Array | None
    merge: jax.Array  # (B, 4) float32

    @property
    def of_direction(self) -> list[jax.Array]:
        """lam, gate and skip where there is one."""
        return [self.lam, self.gate, *([] if self.skip is None else [self.skip])]


def _direction_forward(
    maps: Maps,
    y: jax.Array | None,
    direction: str,
    slot: int,
    chunk: int | None,
    *,
    dtype: Any,
    keep: bool,
    tile: Tile,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """y plus the share of a direction, (B, H, W, C) of `dtype`, and h in x's dtype if it is to be kept.

    Args:
      y: float32, the shares of the directions before; None for the first.
      slot: of the direction in the maps.
      dtype: of the result.
      keep: whether h is wanted.
    """
    walk = Pipeline(maps.x.shape, direction, chunk, tile, reverse=False)
    state, mix = StateLines(walk, 1), Weights(walk, maps.logits, True, slot)
    rows, channels, warpgroups = tile.rows, tile.channels, tile.warpgroups
    tiles = [(maps.x, ()), *((array, (slot,)) for array in maps.of_direction), *([] if y is None else [(y, ())])]

    def body(launch, *refs):
        refs = list(refs)
        sources = [refs.pop(0) for _ in tiles]
        w_ref, merge_ref, given, y_ref = (refs.pop(0) for _ in range(4))
        h_ref: Any = refs.pop(0) if keep else None
        passed = refs.pop(0)
        rings = [refs.pop(0) for _ in tiles]
        w_in, y_out = refs.pop(0), refs.pop(0)
        h_out: Any = refs.pop(0) if keep else None
        lines, arrived, joint = refs
        walk.enter(launch)
        own = walk.warpgroup
        merge = merge_ref[walk.image, slot]

        def load(n, at):
            barrier = arrived.at[own * walk.stages + at]
            for ref, ring, (_, slots) in zip(sources, rings, tiles, strict=True):
                primitives.fetch(walk.at(ref, walk.line(n), walk.rows(), *slots), ring.at[own, at], barrier)
            mix.fetch(w_ref, w_in.at[own, at], n, barrier)

        def compute(n, at, out, now, same):
            w, _ = mix.read(w_in.at[own, at])
            smaller, larger = (primitives.load(lines.at[now, 0, state.rows(shift)]) for shift in (-1, 1))
            x, lam, gate, *others = (primitives.load(ring.at[own, at]) for ring in rings)
            h = w[1] * same + (w[0] * smaller + w[2] * larger) + lam * x
            lines[1 - now, 0, state.rows()] = h
            kept = h.astype(maps.x.dtype)
            # What the gate meets is h as it is kept, so that forward and backward agree.
            part = gate * kept.astype(jnp.float32)
            if maps.skip is not None:
                part += others[0] * x
            part *= merge
            if y is not None:
                part += others[-1]
            y_out[own, out] = part.astype(dtype)
            if keep:
                h_out[own, out] = kept
            return h

        def store(n, out):
            walk.store(y_out.at[own, out], y_ref, n)
            if keep:
                walk.store(h_out.at[own, out], h_ref, n)

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
        *(memory((warpgroups, walk.stages, rows, channels), array.dtype) for array, _ in tiles),
        memory((warpgroups, walk.stages, *mix.tile), maps.logits.dtype),
        memory((warpgroups, tile.stores, rows, channels), dtype),
        *([memory((warpgroups, tile.stores, rows, channels), maps.x.dtype)] if keep else []),
        state.scratch,
        primitives.barriers(len(tiles) + 1, warpgroups * walk.stages),
        primitives.barriers(1 if tile.ghost else warpgroups),
    ]
    results = [primitives.blank(maps.x.shape, kind, interpret) for kind in (dtype, *([maps.x.dtype] if keep else []))]
    inputs = (*(array for array, _ in tiles), maps.logits, maps.merge)
    walk.run("propagation_forward", body, inputs, results, 1, scratch, interpret)
    return results[0][...], results[1][...] if keep else None


def _direction_backward(
    maps: Maps,
    h: jax.Array,
    grad_y: jax.Array,
    grad_x: jax.Array | None,
    grads: Sequence[Any],
    direction: str,
    slot: int,
    chunk: int | None,
    *,
    dtype: Any,
    tile: Tile,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """grad_x plus the share of a direction, (B, H, W, C) of `dtype`, and the parts of the gradient of merge[slot].

    With s = merge grad_y, the gradient of h begins as s gate; grad_gate = s h, grad_skip = s x, and merge gets the sum
    of grad_y (gate h + skip x), of which each CTA writes its part for each of its pixels and channels: an array to be
    summed over all but its second axis, the images.

    Args:
      h: of the direction, as the forward kernel kept it.
      grad_x: float32, the shares of the directions before; None for the first.
      grads: refs that the gradients of logits, lam, gate and skip are written into, at the direction's slot.
    """
    walk = Pipeline(maps.x.shape, direction, chunk, tile, reverse=True)
    state, mix = StateLines(walk, 2), Weights(walk, maps.logits, True, slot)
    rows, channels, warpgroups = tile.rows, tile.channels, tile.warpgroups
    margin = primitives.margin(channels, h.dtype)
    of_direction = maps.of_direction
    tiles = [(maps.x, ()), (grad_y, ()), (h, ()), *((array, (slot,)) for array in of_direction)]
    tiles += [] if grad_x is None else [(grad_x, ())]

    def body(launch, *refs):
        refs = list(refs)
        sources = [refs.pop(0) for _ in tiles]
        w_ref, merge_ref, given, x_grad, sums = (refs.pop(0) for _ in range(5))
        w_grad, *map_grads = (refs.pop(0) for _ in grads)
        passed = refs.pop(0)
        rings = [refs.pop(0) for _ in tiles]
        w_in, h_in, x_out, w_out = (refs.pop(0) for _ in range(4))
        outs = [refs.pop(0) for _ in of_direction]
        lines, arrived, joint = refs
        walk.enter(launch)
        own = walk.warpgroup
        merge = merge_ref[walk.image, slot]

        def load(n, at):
            barrier = arrived.at[own * walk.stages + at]
            for ref, ring, (_, slots) in zip(sources, rings, tiles, strict=True):
                primitives.fetch(walk.at(ref, walk.line(n), walk.rows(), *slots), ring.at[own, at], barrier)
            mix.fetch(w_ref, w_in.at[own, at], n, barrier)
            walk.fetch_before(sources[2], h_in.at[own, at], n, margin, barrier)

        def compute(n, at, out, now, carry):
            same, of_merge = carry
            w, kept = mix.read(w_in.at[own, at])
            x, grad, h_line, lam, gate, *others = (primitives.load(ring.at[own, at]) for ring in rings)
            scaled = merge * grad
            g = scaled * gate + same
            g += primitives.load(lines.at[now, 0, state.rows(1)]) + primitives.load(lines.at[now, 1, state.rows(-1)])
            lines[1 - now, 0, state.rows()] = w[0] * g
            lines[1 - now, 1, state.rows()] = w[2] * g

            before = walk.before(h_in.at[own, at], margin)
            mix.write(w_out.at[own, out], mix.gradients([g * neighbour for neighbour in before], kept))
            to_x, part = lam * g, gate * h_line
            if maps.skip is not None:
                to_x, part = to_x + others[0] * scaled, part + others[0] * x
            if grad_x is not None:
                to_x += others[-1]
            x_out[own, out] = to_x.astype(dtype)
            for ref, value, like in zip(outs, (x * g, h_line * scaled, x * scaled), of_direction, strict=False):
                ref[own, out] = value.astype(like.dtype)
            return w[1] * g, of_merge + grad * part

        def store(n, out):
            walk.store(x_out.at[own, out], x_grad, n)
            mix.store(w_out.at[own, out], w_grad, n)
            for source, target in zip(outs, map_grads, strict=True):
                walk.store(source.at[own, out], target, n, slot)

        state.clear(lines, joint)
        same = nothing = primitives.zeros(rows, channels)
        if tile.ghost:
            state.receive(lines, given, [(0, 0), (0, 1), (1, 0)], joint)
            same = primitives.load(lines.at[1, 0, state.rows()])
            primitives.commit()  # all have read it before the first line writes there
        same, of_merge = walk.walk(load, compute, store, arrived, joint, (same, nothing))
        last = lax.rem(walk.count, 2)
        if tile.ghost:
            lines[1 - last, 0, state.rows()] = same
            state.send(lines, [(last, 0), (last, 1), (1 - last, 0)], passed)
        primitives.wait_written()
        # Nobody reads the state any more: the sums leave by way of it, those of pixels that other CTAs own as zeros.
        pixel = walk.place + primitives.pixels(rows, channels)
        is_own = (pixel >= walk.offset) & (pixel < walk.offset + tile.own)
        walk.meet(joint)
        lines[0, 0, state.rows()] = jnp.where(is_own, of_merge, 0.0)
        primitives.commit()
        place = (walk.launch, walk.image, walk.chunk_index, walk.segment, pl.ds(walk.place, rows), walk.block)
        primitives.store(lines.at[0, 0, state.rows()], sums.at[place])
        primitives.end_group()
        primitives.wait_written()

    memory = primitives.shared_memory
    ring, results = (warpgroups, walk.stages), (warpgroups, tile.stores)
    scratch = [
        *(memory((*ring, rows, channels), array.dtype) for array, _ in tiles),
        memory((*ring, *mix.tile), maps.logits.dtype),
        memory((*ring, rows + 3 * margin, channels), h.dtype),
        memory((*results, rows, channels), dtype),
        memory((*results, *mix.tile), maps.logits.dtype),
        *(memory((*results, rows, channels), array.dtype) for array in of_direction),
        state.scratch,
        primitives.barriers(len(tiles) + 2, warpgroups * walk.stages),
        primitives.barriers(3 if tile.ghost else warpgroups),
    ]
    sums = (walk.launches, walk.batch, walk.chunks, walk.segments, tile.extent, walk.blocks * channels)
    made = [primitives.blank(maps.x.shape, dtype, interpret), primitives.blank(sums, jnp.float32, interpret)]
    inputs = (*(array for array, _ in tiles), maps.logits, maps.merge)
    walk.run("propagation_backward", body, inputs, [*made, *grads], 3, scratch, interpret)
    return made[0][...], made[1][...]
