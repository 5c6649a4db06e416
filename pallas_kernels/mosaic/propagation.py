"""Propagation, forward and backward, as Mosaic GPU kernels: scans with normalisation, gate, skip and merge inside.

The directions are launched one after the other, and each adds its share to y. So no two CTAs update the same element,
and results are bit-equal from run to run. y is float32 until the last direction writes it in x's dtype.

Bytes moved per pixel and channel in bfloat16, for all four directions:
    forward: 82 (x and 6 maps in each direction, and 26 for y); 90 if h is written, which only differentiation needs.
    backward: 146 (x, h, the gradient of y, 6 maps and their gradients in each direction, and 26 for the gradient of x).
    If the kernels make the maps (`maps.Made`), they read none: 34, 42 and 98.

Keeping h costs 16 of these bytes; computing it again costs a forward pass. So it is kept, unless the caller uses
`jax.checkpoint`. `on_chip` walks small maps in one launch.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.maps import Given, Made, Read
from pallas_kernels.mosaic.pipeline import Pipeline, StateLines
from pallas_kernels.mosaic.tiles import Tile


def propagate_forward(
    x: jax.Array,
    maps: Sequence[Given | Made],
    merge: jax.Array,
    *,
    chunk: int | None,
    keep: bool,
    tiles: Sequence[Tile],
    interpret: bool,
) -> tuple[jax.Array, list[jax.Array]]:
    """y of `propagate`, and h of the four directions in x's dtype (an empty list unless `keep`).

    Args:
        x: (B, H, W, C).
        maps: for each direction.
        merge: (B, 4) float32.
        chunk: lines after which the scans restart, or None.
        keep: whether h is written.
        tiles: for each direction.
        interpret: whether the interpreter runs the kernels.
    """
    y, states = None, []
    for d in range(len(DIRECTIONS)):
        dtype = x.dtype if d == len(DIRECTIONS) - 1 else jnp.float32
        y, h = _direction_forward(
            x, maps[d], merge, y, d, chunk, dtype=dtype, keep=keep, tile=tiles[d], interpret=interpret
        )
        states += [] if h is None else [h]
    assert y is not None
    return y, states


def propagate_backward(
    x: jax.Array,
    maps: Sequence[Given | Made],
    merge: jax.Array,
    h: Sequence[jax.Array],
    grad_y: jax.Array,
    *,
    chunk: int | None,
    tiles: Sequence[Tile],
    interpret: bool,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array], jax.Array]:
    """Gradients of x, logits, the maps (lam, gate and, if given, skip), and merge (B, 4).

    Arguments as in `propagate_forward`. The gradient of logits is a list: of one array (B, H, W, 12, C), or for shared
    logits of one array for each direction, in parts as from `line_scan.scan_backward`. Each map's is (B, H, W, 4, C).
    """
    grad_x, of_merge, of_logits, of_maps = None, [], [], []
    for d, direction in enumerate(DIRECTIONS):
        source = maps[d].of(Pipeline(x.shape, direction, chunk, tiles[d], reverse=True), d, one_direction=True)
        if source.mix.is_shared or not of_logits:
            of_logits.append(primitives.Blank(source.gradients[0].shape, source.gradients[0].dtype, interpret))
        of_maps = of_maps or [primitives.Blank(a.shape, a.dtype, interpret) for a in source.gradients[1:]]
        dtype = x.dtype if d == len(DIRECTIONS) - 1 else jnp.float32
        grad_x, sums = _direction_backward(
            source, x, merge, h[d], grad_y, grad_x, [of_logits[-1], *of_maps], dtype=dtype, interpret=interpret
        )
        of_merge.append(jnp.sum(sums, axis=(0, 2, 3, 4, 5)))
    assert grad_x is not None
    return grad_x, [ref[...] for ref in of_logits], [ref[...] for ref in of_maps], jnp.stack(of_merge, axis=1)


def advance(
    maps: Read, x: jax.Array, merge: jax.Array, neighbours: Sequence[jax.Array], dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One line of the recurrence: the new state, the same in `dtype` as it is kept, and the share of y.

    All are (rows, channels) tiles.

    Args:
        maps: of the line.
        x: the line, float32.
        merge: the direction's scalar.
        neighbours: the state of the line before, at the neighbours of smaller, same and larger index.
        dtype: of the kept state.
    """
    smaller, same, larger = neighbours
    w = maps.weights
    h = w[1] * same + (w[0] * smaller + w[2] * larger) + maps.lam * x
    kept = h.astype(dtype)
    # The gate multiplies h as it is kept, rounded, because the backward pass will read it so.
    part = maps.gate * kept.astype(jnp.float32)
    if maps.skip is not None:
        part += maps.skip * x
    return h, kept, part * merge


def _direction_forward(
    x: jax.Array,
    maps: Given | Made,
    merge: jax.Array,
    y: jax.Array | None,
    slot: int,
    chunk: int | None,
    *,
    dtype: Any,
    keep: bool,
    tile: Tile,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """y plus the share of one direction, (B, H, W, C) in `dtype`, and h in x's dtype (None unless `keep`).

    Args:
        x: (B, H, W, C).
        maps: of the direction.
        merge: (B, 4) float32.
        y: float32, the sum of the directions before; None for the first.
        slot: the direction's index in `DIRECTIONS` and in the maps.
        chunk: lines after which the scan restarts, or None.
        dtype: of the result.
        keep: whether h is written.
        tile: of the kernel.
        interpret: whether the interpreter runs the kernel.
    """
    walk = Pipeline(x.shape, DIRECTIONS[slot], chunk, tile, reverse=False)
    state, source = StateLines(walk, 1), maps.of(walk, slot, one_direction=True)
    rows, channels, warpgroups = tile.rows, tile.channels, tile.warpgroups
    tiles = [x, *([] if y is None else [y])]

    def body(launch, *refs):
        refs = list(refs)
        tile_refs, map_refs = primitives.take(refs, tiles), primitives.take(refs, source.inputs)
        merge_ref, given, y_ref = primitives.take(refs, range(3))
        h_ref: Any = refs.pop(0) if keep else None
        passed = refs.pop(0)
        rings, map_scratch = primitives.take(refs, tiles), primitives.take(refs, source.scratch)
        y_out = refs.pop(0)
        h_out: Any = refs.pop(0) if keep else None
        lines, arrived, joint = refs
        walk.enter(launch)
        source.enter(map_refs, map_scratch)
        own = walk.warpgroup
        merge = merge_ref[walk.image, slot]

        def load(n, at):
            barrier = arrived.at[own * walk.stages + at]
            for ref, ring in zip(tile_refs, rings, strict=True):
                primitives.fetch(walk.at(ref, walk.line(n), walk.rows()), ring.at[own, at], barrier)
            source.fetch(n, at, barrier)

        def compute(n, at, out, now, same):
            read = source.read(n, at)
            smaller, larger = (primitives.load(lines.at[now, 0, state.rows(shift)]) for shift in (-1, 1))
            x_line, *before = (primitives.load(ring.at[own, at]) for ring in rings)

            def arithmetic():
                h, kept, part = advance(read, x_line, merge, (smaller, same, larger), x.dtype)
                lines[1 - now, 0, state.rows()] = h
                y_out[own, out] = sum(before, part).astype(dtype)
                if keep:
                    h_out[own, out] = kept
                return h

            return source.during(n, arithmetic)

        def store(n, out):
            walk.store(y_out.at[own, out], y_ref, n)
            if keep:
                walk.store(h_out.at[own, out], h_ref, n)

        source.start()
        state.clear(lines, joint)
        same = primitives.zeros(rows, channels)
        if tile.ghost:
            state.receive(lines, given, [(0, 0)], joint)
            same = primitives.load(lines.at[0, 0, state.rows()])
        source.prepare()
        walk.walk(load, compute, store, arrived, joint, same)
        if tile.ghost:
            state.send(lines, [(lax.rem(walk.count, 2), 0)], passed)
        primitives.wait_written()

    memory = primitives.shared_memory
    scratch = [
        *(memory((warpgroups, walk.stages, rows, channels), array.dtype) for array in tiles),
        *source.scratch,
        memory((warpgroups, tile.stores, rows, channels), dtype),
        *([memory((warpgroups, tile.stores, rows, channels), x.dtype)] if keep else []),
        state.scratch,
        primitives.barriers(len(tiles) + source.copies, warpgroups * walk.stages),
        primitives.barriers(1 if tile.ghost else warpgroups),
    ]
    results = [primitives.Blank(x.shape, kind, interpret) for kind in (dtype, *([x.dtype] if keep else []))]
    walk.run("propagation_forward", body, (*tiles, *source.inputs, merge), results, 1, scratch, interpret)
    return results[0][...], results[1][...] if keep else None


def _direction_backward(
    source: Any,
    x: jax.Array,
    merge: jax.Array,
    h: jax.Array,
    grad_y: jax.Array,
    grad_x: jax.Array | None,
    grads: Sequence[Any],
    *,
    dtype: Any,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """grad_x plus the share of one direction, (B, H, W, C) in `dtype`, and the parts of the gradient of merge[slot].

    With s = merge * grad_y, the gradient of h starts as s * gate, grad_gate = s * h and grad_skip = s * x. The gradient
    of merge is the sum of grad_y * (gate * h + skip * x): each CTA writes its part for each of its pixels and channels,
    and XLA sums the array over all axes but the second, the images.

    Args:
        source: `maps.GivenMaps` or `maps.MadeMaps` of the direction.
        x: (B, H, W, C).
        merge: (B, 4) float32.
        h: of the direction, as the forward kernel kept it.
        grad_y: (B, H, W, C).
        grad_x: float32, the sum of the directions before; None for the first.
        grads: the results for the gradients of logits, lam, gate and skip, each written at the direction's slot.
        dtype: of the returned grad_x.
        interpret: whether the interpreter runs the kernel.
    """
    walk, mix, slot = source.walk, source.mix, source.slot
    state, tile = StateLines(walk, 2), walk.tile
    rows, channels, warpgroups = tile.rows, tile.channels, tile.warpgroups
    margin = primitives.margin(channels, h.dtype)
    of_maps = source.gradients[1:]
    tiles = [x, grad_y, h, *([] if grad_x is None else [grad_x])]

    def body(launch, *refs):
        refs = list(refs)
        tile_refs, map_refs = primitives.take(refs, tiles), primitives.take(refs, source.inputs)
        merge_ref, given, x_grad, sums = primitives.take(refs, range(4))
        w_grad, *map_grads = primitives.take(refs, grads)
        passed = refs.pop(0)
        rings, map_scratch = primitives.take(refs, tiles), primitives.take(refs, source.scratch)
        h_in, x_out, w_out = primitives.take(refs, range(3))
        outs = primitives.take(refs, of_maps)
        lines, arrived, joint = refs
        walk.enter(launch)
        source.enter(map_refs, map_scratch)
        own = walk.warpgroup
        merge = merge_ref[walk.image, slot]

        def load(n, at):
            barrier = arrived.at[own * walk.stages + at]
            for ref, ring in zip(tile_refs, rings, strict=True):
                primitives.fetch(walk.at(ref, walk.line(n), walk.rows()), ring.at[own, at], barrier)
            source.fetch(n, at, barrier)
            walk.fetch_before(tile_refs[2], h_in.at[own, at], n, margin, barrier)

        def compute(n, at, out, now, carry):
            same, of_merge = carry
            read = source.read(n, at)
            w = read.weights
            x_line, grad, h_line, *shares = (primitives.load(ring.at[own, at]) for ring in rings)

            def arithmetic():
                scaled = merge * grad
                g = scaled * read.gate + same
                g += primitives.load(lines.at[now, 0, state.rows(1)])
                g += primitives.load(lines.at[now, 1, state.rows(-1)])
                lines[1 - now, 0, state.rows()] = w[0] * g
                lines[1 - now, 1, state.rows()] = w[2] * g

                before = walk.before(h_in.at[own, at], margin)
                mix.write(w_out.at[own, out], mix.gradients([g * neighbour for neighbour in before], read.kept))
                to_x, part = read.lam * g, read.gate * h_line
                if read.skip is not None:
                    to_x, part = to_x + read.skip * scaled, part + read.skip * x_line
                x_out[own, out] = sum(shares, to_x).astype(dtype)
                for ref, value in zip(outs, (x_line * g, h_line * scaled, x_line * scaled), strict=False):
                    ref[own, out] = value.astype(ref.dtype)
                return w[1] * g, of_merge + grad * part

            return source.during(n, arithmetic)

        def store(n, out):
            walk.store(x_out.at[own, out], x_grad, n)
            mix.store(w_out.at[own, out], w_grad, n)
            for ref, target in zip(outs, map_grads, strict=True):
                walk.store(ref.at[own, out], target, n, slot)

        source.start()
        state.clear(lines, joint)
        same = nothing = primitives.zeros(rows, channels)
        if tile.ghost:
            state.receive(lines, given, [(0, 0), (0, 1), (1, 0)], joint)
            same = primitives.load(lines.at[1, 0, state.rows()])
            primitives.commit()  # every thread has read it before the first line writes there
        source.prepare()
        same, of_merge = walk.walk(load, compute, store, arrived, joint, (same, nothing))
        last = lax.rem(walk.count, 2)
        if tile.ghost:
            lines[1 - last, 0, state.rows()] = same
            state.send(lines, [(last, 0), (last, 1), (1 - last, 0)], passed)
        primitives.wait_written()
        # The state is no longer read, so the sums leave through its buffer, as zeros where another CTA owns the pixel.
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
        *(memory((*ring, rows, channels), array.dtype) for array in tiles),
        *source.scratch,
        memory((*ring, rows + 3 * margin, channels), h.dtype),
        memory((*results, rows, channels), dtype),
        memory((*results, *mix.tile), source.gradients[0].dtype),
        *(memory((*results, rows, channels), array.dtype) for array in of_maps),
        state.scratch,
        primitives.barriers(len(tiles) + source.copies + 1, warpgroups * walk.stages),
        primitives.barriers(3 if tile.ghost else warpgroups),
    ]
    sums = (walk.launches, walk.batch, walk.chunks, walk.segments, tile.extent, walk.blocks * channels)
    made = [primitives.Blank(x.shape, dtype, interpret), primitives.Blank(sums, jnp.float32, interpret)]
    inputs = (*tiles, *source.inputs, merge)
    walk.run("propagation_backward", body, inputs, [*made, *grads], 3, scratch, interpret)
    return made[0][...], made[1][...]
