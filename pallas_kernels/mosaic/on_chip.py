"""Propagation of a small map in one kernel: x and y stay in shared memory while it walks all four directions.

A CTA owns (image, channel block). It loads x once, makes the maps of each direction, sums y in float32, and writes y
once after the last direction. In bfloat16 it moves 4 bytes per pixel and channel and the proxy, and 8 more where it
writes h for a gradient; so instructions and shared memory limit it. The backward kernel is that of `kernels`.

All directions use the same tile, with as many pixels as the longer side of the map.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.kernels import Results, advance, mix, share
from pallas_kernels.mosaic.maps import Made
from pallas_kernels.mosaic.state import StateLines


def forward(
    x: jax.Array, sources: Sequence[Made], merge: jax.Array, results: Results, *, interpret: bool
) -> dict[str, jax.Array]:
    """As `kernels.forward`, for all directions.

    Args:
        x: (B, H, W, C).
        sources: of the maps of each direction. Their frames have the same tile: one warpgroup, at least as many pixels
            as H and as W, and all chunks.
        merge: (4,) float32.
        results: "y", (B, H, W, C), and (B, 4, H, W, C) "h" or not.
        interpret: whether the interpreter runs the kernel.
    """
    frames = [source.frame for source in sources]
    state, tile = StateLines(frames[0], 1), frames[0].tile
    rows, channels, keep, last = tile.rows, tile.channels, "h" in results, len(sources) - 1

    def body(refs, scratch):
        buffers, x_map, y_map = scratch["state"], scratch["x_map"], scratch["y_map"]
        for d, source in enumerate(sources):
            source.frame.enter(0)
            source.enter(refs, scratch)
            if d:
                source.follow(sources[d - 1])
        frame = frames[0]
        whole = pl.ds(frame.pixel, rows)
        primitives.fetch(refs["x"].at[frame.image, whole, whole, frame.block], x_map, scratch["x_arrived"])
        sources[0].start()

        for d, (frame, source) in enumerate(zip(frames, sources, strict=True)):
            scale = refs["merge"][d]

            def compute(n, _, out, now, same, d=d, frame=frame, source=source, scale=scale):
                def arithmetic(maps):
                    (axis,) = frame.axes
                    x_line, y_line = (
                        ref.at[frame.line(n)] if axis == 1 else ref.at[:, frame.line(n)] for ref in (x_map, y_map)
                    )
                    line = primitives.load(x_line, is_part=True)
                    neighbours = [buffers.at[now, 0, state.rows(shift)] for shift in (-1, 1)]
                    mixed = frame.unless_first(n, lambda: mix(maps, neighbours, same))
                    h, kept = advance(mixed, maps, line, x.dtype)
                    buffers[1 - now, 0, state.rows()] = h
                    part = scale * share(maps, kept, line)
                    if d:
                        part += primitives.load(y_line, is_part=True)
                    if d < last:
                        y_line[...] = part
                    else:
                        scratch["y"][0, out] = part.astype(x.dtype)
                    if keep:
                        scratch["h"][0, out] = kept
                    return h

                return source.during(n, None, arithmetic)

            def store(n, out, d=d, frame=frame):
                (axis,) = frame.axes
                if d == last:
                    frame.store(scratch["y"].at[0, out], refs["y"], axis, n)
                if keep:
                    frame.store(scratch["h"].at[0, out], refs["h"], axis, n, slot=d)

            state.clear(buffers, None)
            if d == 0:
                primitives.wait(scratch["x_arrived"])
            before = sum(other.lines for other in frames[:d])
            source.prepare()
            same = primitives.zeros(rows, channels)
            frame.walk(None, compute, store, None, None, same, before=before)
        primitives.wait_written()

    memory: Any = primitives.shared_memory
    scratch = dict(
        **sources[0].scratch,
        x_map=memory((rows, rows, channels), x.dtype),
        y_map=memory((rows, rows, channels), "float32"),
        **{name: memory((1, tile.stores, rows, channels), x.dtype) for name in results},
        state=state.scratch,
        x_arrived=primitives.barriers(1),
    )
    inputs = {"x": x, "merge": merge, **{name: array for source in sources for name, array in source.inputs.items()}}
    return frames[0].run("low_rank_on_chip", body, inputs, results, 1, scratch, interpret)
