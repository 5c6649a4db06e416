"""Propagation of a small map in one kernel: x and y stay in shared memory while it walks all four directions.

A CTA owns (image, channel block). It loads x once, sums y in float32, and writes y once after the last direction. In
bfloat16 the kernel moves 52 bytes per pixel and channel if the maps are in memory. If it makes the maps, it moves 4
bytes and the proxy; then instructions and shared memory limit it. Under differentiation it also writes h of the four
directions, 8 bytes. The backward kernels are those of `propagation`.

All directions use the same tile, with as many pixels as the longer side of the map. Chunks are not spread over the
grid, as they are in `propagation`: the state restarts within the walk.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.maps import Given, Made
from pallas_kernels.mosaic.pipeline import Pipeline, StateLines
from pallas_kernels.mosaic.propagation import advance
from pallas_kernels.mosaic.tiles import Tile


def propagate_forward(
    x: jax.Array,
    maps: Sequence[Given | Made],
    merge: jax.Array,
    *,
    chunk: int | None,
    keep: bool,
    tile: Tile,
    interpret: bool,
) -> tuple[jax.Array, list[jax.Array]]:
    """As `propagation.propagate_forward`, with one tile: one warpgroup and at least as many pixels as H and as W."""
    walks = [Pipeline(x.shape, direction, None, tile, reverse=False) for direction in DIRECTIONS]
    stages = min(walk.stages for walk in walks)
    for walk in walks:
        walk.stages = stages
    sources: list[Any] = [
        of_direction.of(walk, d, one_direction=False)
        for d, (of_direction, walk) in enumerate(zip(maps, walks, strict=True))
    ]
    inputs = list({id(array): array for source in sources for array in source.inputs}.values())
    state, rows, channels = StateLines(walks[0], 1), tile.rows, tile.channels
    last = len(DIRECTIONS) - 1

    def body(launch, *refs):
        refs = list(refs)
        x_ref = refs.pop(0)
        map_refs = dict(zip(map(id, inputs), primitives.take(refs, inputs), strict=True))
        merge_ref, _, y_ref = primitives.take(refs, range(3))
        h_refs = primitives.take(refs, DIRECTIONS if keep else ())
        _, x_map, y_map = primitives.take(refs, range(3))
        map_scratch = primitives.take(refs, sources[0].scratch)
        y_out = refs.pop(0)
        h_out: Any = refs.pop(0) if keep else None
        lines, arrived, x_arrived = refs

        for d, (walk, source) in enumerate(zip(walks, sources, strict=True)):
            walk.enter(launch)
            source.enter([map_refs[id(array)] for array in source.inputs], map_scratch)
            if d:
                source.follow(sources[d - 1])
        zero = walks[0].pixel
        whole = pl.ds(zero, rows)
        primitives.fetch(x_ref.at[walks[0].image, whole, whole, walks[0].block], x_map, x_arrived)
        sources[0].start()

        def load(d):
            def start(n, at):
                sources[d].fetch(n, at, arrived.at[at])

            return start if sources[d].copies else None

        for d, (walk, source) in enumerate(zip(walks, sources, strict=True)):
            merge = merge_ref[walk.image, d]
            restarts = chunk if chunk is not None and chunk < walk.lines else 0

            def compute(n, at, out, now, same, d=d, walk=walk, source=source, merge=merge, restarts=restarts):
                read = source.read(n, at)
                shifted = (lines.at[now, 0, state.rows(shift)] for shift in (-1, 1))
                smaller, larger = (primitives.load(ref) for ref in shifted)
                neighbours = smaller, same, larger
                if restarts:
                    # Selected, not multiplied by 0: a product would pass on NaN and infinity.
                    starts = lax.rem(n, restarts) == 0
                    neighbours = [jnp.where(starts, 0.0, neighbour) for neighbour in neighbours]
                x_line, y_line = (
                    ref.at[walk.line(n)] if walk.axis == 1 else ref.at[:, walk.line(n)] for ref in (x_map, y_map)
                )
                h, kept, part = advance(read, primitives.load(x_line, is_part=True), merge, neighbours, x.dtype)
                lines[1 - now, 0, state.rows()] = h
                if d:
                    part += primitives.load(y_line, is_part=True)
                if d < last:
                    y_line[...] = part
                else:
                    y_out[0, out] = part.astype(x.dtype)
                if keep:
                    h_out[0, out] = kept
                return h

            def store(n, out, d=d, walk=walk):
                if d == last:
                    walk.store(y_out.at[0, out], y_ref, n)
                if keep:
                    walk.store(h_out.at[0, out], h_refs[d], n)

            state.clear(lines, None)
            if d == 0:
                primitives.wait(x_arrived)
            before = sum(other.lines for other in walks[:d])
            following = load(d + 1) if d < last else None
            same = primitives.zeros(rows, channels)
            source.prepare()
            walk.walk(load(d), compute, store, arrived, None, same, before=before, following=following)
        primitives.wait_written()

    memory = primitives.shared_memory
    scratch = [
        memory((rows, rows, channels), x.dtype),
        memory((rows, rows, channels), jnp.float32),
        *sources[0].scratch,
        memory((1, tile.stores, rows, channels), x.dtype),
        *([memory((1, tile.stores, rows, channels), x.dtype)] if keep else []),
        state.scratch,
        primitives.barriers(max(1, sources[0].copies), stages),
        primitives.barriers(1),
    ]
    results = [primitives.Blank(x.shape, x.dtype, interpret) for _ in range(1 + 4 * keep)]
    walks[0].run("propagation_on_chip", body, (x, *inputs, merge), results, 1, scratch, interpret)
    y, *states = (ref[...] for ref in results)
    return y, states
