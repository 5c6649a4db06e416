"""The two kernels, forward and backward, that scan the directions of one launch (equation 1 of GSPN and its gradient).

With maps in memory (`maps.Loaded`) they are a line scan. With maps made from a proxy (`maps.Made`) they are the inside
of a propagation: each direction writes its share gate * h + skip * x, and XLA merges the shares. No two CTAs update the
same element, so results are bit-equal from run to run.

Bytes moved per pixel and channel in bfloat16, for each direction:

| kernel | forward | backward |
|---|---|---|
| line scan from logits | 12: x, lam, 3 logits, h | 24: these, grad_h, and the gradients of x, lam and logits |
| made maps | 4: x and the share; in training 6, with h | 20: x, h, grad_y, and the gradients of x and 6 maps |
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax

from pallas_kernels.mosaic import instructions, primitives
from pallas_kernels.mosaic.maps import Line, Loaded, Made
from pallas_kernels.mosaic.state import StateLines

Results = Mapping[str, jax.Array | jax.ShapeDtypeStruct]


def forward(x: jax.Array, source: Loaded | Made, results: Results, *, interpret: bool) -> dict[str, jax.Array]:
    """Fills the places of the launch's directions in `results`.

    Args:
        x: (B, H, W, C).
        source: of the maps, with the frame of the launch.
        results: "h", "share" or both, (B, D, H, W, C) each.
        interpret: whether the interpreter runs the kernel.
    """
    frame = source.frame
    state, tile = StateLines(frame, 1), frame.tile
    rows, channels = tile.rows, tile.channels

    def body(refs, scratch):
        frame.enter(frame.number(refs))
        source.enter(refs, scratch)
        warpgroup, buffers = frame.warpgroup, scratch["state"]

        def load(n, at):
            barrier = scratch["arrived"].at[warpgroup * frame.stages + at]

            def copy(axis):
                frame.fetch(refs["x"], scratch["x"].at[warpgroup, at], axis, n, barrier)
                source.fetch(axis, n, at, barrier)

            frame.by_axis(copy)

        def compute(n, at, out, now, same):
            def arithmetic(maps):
                line = primitives.load(scratch["x"].at[warpgroup, at])
                neighbours = [buffers.at[now, 0, state.rows(shift)] for shift in (-1, 1)]
                mixed = frame.unless_first(n, lambda: mix(maps, neighbours, same))
                h, kept = advance(mixed, maps, line, x.dtype)
                buffers[1 - now, 0, state.rows()] = h
                if "h" in results:
                    scratch["h"][warpgroup, out] = kept
                if "share" in results:
                    scratch["share"][warpgroup, out] = share(maps, kept, line).astype(x.dtype)
                return h

            return source.during(n, at, arithmetic)

        def store(n, out):
            def copy(axis):
                for name in results:
                    frame.store(scratch[name].at[warpgroup, out], refs[name], axis, n, slot=frame.slot)

            frame.by_axis(copy)

        frame.start(load)
        source.start()
        same = state.begin(buffers, refs.get("given"), [(0, 0)], scratch["joint"])
        source.prepare()
        frame.walk(load, compute, store, scratch["arrived"], scratch["joint"], same)
        if tile.ghost:
            state.send(buffers, [(lax.rem(frame.count, 2), 0)], refs["passed"])
        primitives.wait_written()

    scratch = dict(
        **source.scratch,
        x=primitives.shared_memory((tile.warpgroups, frame.stages, rows, channels), x.dtype),
        **{name: primitives.shared_memory((tile.warpgroups, tile.stores, rows, channels), x.dtype) for name in results},
        state=state.scratch,
        arrived=primitives.barriers(1 + source.copies, tile.warpgroups * frame.stages),
        joint=primitives.barriers(1 if tile.ghost else tile.warpgroups),
    )
    name = "low_rank_forward" if isinstance(source, Made) else "scan_forward"
    return frame.run(name, body, {"x": x, **source.inputs}, results, 1, scratch, interpret)


def mix(maps: Line, neighbours: Any, same: jax.Array) -> jax.Array:
    """The tridiagonal mix of the line before.

    Args:
        maps: of the line.
        neighbours: refs of the state at the neighbours of smaller and larger index.
        same: the state at the pixels themselves.
    """
    (of_smaller, of_same, of_larger), _ = maps.weights()
    smaller, larger = map(primitives.load, neighbours)
    return of_same * same + (of_smaller * smaller + of_larger * larger)


def advance(mixed: jax.Array, maps: Line, x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The new state, and the same in `dtype` as it is kept."""
    h = mixed + maps.lam * x
    return h, h.astype(dtype)


def share(maps: Line, kept: jax.Array, x: jax.Array) -> jax.Array:
    """What a line adds to y. The gate multiplies h as it is kept, rounded: the backward pass will read it so."""
    assert maps.gate is not None
    part = maps.gate * instructions.widen(kept)
    return part if maps.skip is None else part + maps.skip * x


def backward(
    x: jax.Array,
    source: Loaded | Made,
    h: jax.Array,
    grad: jax.Array,
    merge: jax.Array | None,
    results: Results,
    *,
    interpret: bool,
) -> dict[str, jax.Array]:
    """Fills the places of the launch's directions in `results`.

    With g the gradient of h, summed over the lines that read it,

        g[i, j] = grad_h[i, j] + sum_k weights[i + 1, j - k, k] g[i + 1, j - k]

    grad_x = lam g, grad_lam = x g, grad_weights[k] = g h[i - 1, j + k]. With made maps grad_h = merge gate grad_y,
    and grad_x gets merge skip grad_y besides. The gradients of merge gate and merge skip are h grad_y and x grad_y.

    The kernel's state is not g but the products weights * g that the next line reads: so each weight is read once, at
    its warpgroup pixel, and normalised once.

    Args:
        x: (B, H, W, C).
        source: of the maps, with the frame of the launch, which walks in reverse.
        h: (B, D, H, W, C), as the forward kernel kept it.
        grad: of h, (B, D, H, W, C); with made maps of y, (B, H, W, C).
        merge: (4,) float32 with made maps, else None.
        results: "x", each direction's part of the gradient (B, D, H, W, C), and the names of `source.gradients`.
        interpret: whether the interpreter runs the kernel.
    """
    frame, weights = source.frame, source.weights
    state, tile = StateLines(frame, 2), frame.tile
    rows, channels = tile.rows, tile.channels
    margin = primitives.margin(channels, h.dtype)
    is_gated = merge is not None
    of_maps = [name for name in source.gradients if name != "weights"]

    def body(refs, scratch):
        frame.enter(frame.number(refs))
        source.enter(refs, scratch)
        warpgroup, buffers = frame.warpgroup, scratch["state"]
        scale = refs["merge"][frame.slot] if is_gated else None

        def load(n, at):
            barrier = scratch["arrived"].at[warpgroup * frame.stages + at]

            def copy(axis):
                fetched = {"x": None, "grad": None if is_gated else frame.slot} | (
                    {"h": frame.slot} if is_gated else {}
                )
                for name, slot in fetched.items():
                    frame.fetch(refs[name], scratch[name].at[warpgroup, at], axis, n, barrier, slot=slot)
                source.fetch(axis, n, at, barrier)
                before = scratch["before"].at[warpgroup, at]
                frame.fetch_before(refs["h"], before, axis, n, margin, barrier, slot=frame.slot)

            frame.by_axis(copy)

        def compute(n, at, out, now, same):
            def arithmetic(maps):
                line, grad_line = (primitives.load(scratch[name].at[warpgroup, at]) for name in ("x", "grad"))

                def passed():
                    return same + (
                        primitives.load(buffers.at[now, 0, state.rows(1)])
                        + primitives.load(buffers.at[now, 1, state.rows(-1)])
                    )

                merged = grad_line if scale is None else scale * grad_line
                g = (merged if maps.gate is None else maps.gate * merged) + frame.unless_last(n, passed)
                grad_weights = scratch["grad_weights"].at[warpgroup, out]

                def pass_on():
                    w, kept = maps.weights()
                    buffers[1 - now, 0, state.rows()] = w[0] * g
                    buffers[1 - now, 1, state.rows()] = w[2] * g
                    before = frame.before(scratch["before"].at[warpgroup, at], margin)
                    weights.write(grad_weights, weights.gradients([g * neighbour for neighbour in before], kept))
                    return w[1] * g

                def end():
                    weights.clear(grad_weights)
                    return primitives.zeros(rows, channels)

                found = {"x": maps.lam * g, "lam": line * g}
                if maps.gate is not None:
                    found["gate"] = primitives.load(scratch["h"].at[warpgroup, at]) * grad_line
                if maps.skip is not None:
                    found["x"] += maps.skip * merged
                    found["skip"] = line * grad_line
                for name, value in found.items():
                    ref = scratch[f"grad_{name}"]
                    ref[warpgroup, out] = value.astype(ref.dtype)
                return frame.unless_first(n, pass_on, end)

            return source.during(n, at, arithmetic)

        def store(n, out):
            def copy(axis):
                frame.store(scratch["grad_x"].at[warpgroup, out], refs["grad_x"], axis, n, slot=frame.slot)
                weights.store(scratch["grad_weights"].at[warpgroup, out], refs["grad_weights"], axis, n)
                for name in of_maps:
                    ref = scratch[f"grad_{name}"].at[warpgroup, out]
                    frame.store(ref, refs[f"grad_{name}"], axis, n, part=frame.slot)

            frame.by_axis(copy)

        frame.start(load)
        source.start()
        same = state.begin(buffers, refs.get("given"), [(0, 0), (0, 1), (1, 0)], scratch["joint"])
        source.prepare()
        same = frame.walk(load, compute, store, scratch["arrived"], scratch["joint"], same)
        if tile.ghost:
            last = lax.rem(frame.count, 2)
            buffers[1 - last, 0, state.rows()] = same
            state.send(buffers, [(last, 0), (last, 1), (1 - last, 0)], refs["passed"])
        primitives.wait_written()

    memory = primitives.shared_memory
    ring, places = (tile.warpgroups, frame.stages), (tile.warpgroups, tile.stores)
    scratch = dict(
        **source.scratch,
        x=memory((*ring, rows, channels), x.dtype),
        grad=memory((*ring, rows, channels), grad.dtype),
        **(dict(h=memory((*ring, rows, channels), h.dtype)) if is_gated else {}),
        before=memory((*ring, rows + 3 * margin, channels), h.dtype),
        grad_x=memory((*places, rows, channels), x.dtype),
        grad_weights=memory((*places, *weights.tile), source.gradients["weights"].dtype),
        **{f"grad_{name}": memory((*places, rows, channels), source.gradients[name].dtype) for name in of_maps},
        state=state.scratch,
        arrived=primitives.barriers(3 + is_gated + source.copies, tile.warpgroups * frame.stages),
        joint=primitives.barriers(3 if tile.ghost else tile.warpgroups),
    )
    name = "low_rank_backward" if is_gated else "scan_backward"
    inputs = {"x": x, "h": h, "grad": grad, **({} if merge is None else {"merge": merge}), **source.inputs}
    found = frame.run(name, body, inputs, {f"grad_{k}": like for k, like in results.items()}, 3, scratch, interpret)
    return {name.removeprefix("grad_"): array for name, array in found.items()}
