"""The line scan, forward and backward, as Mosaic GPU kernels (equation 1 of GSPN and its gradient).

Memory traffic limits both: each input is read once and each result is written once. In bfloat16 from logits the
forward kernel moves 12 bytes per pixel and channel, the backward kernel 24. C is a multiple of 16 bytes; `weights`
describes the two forms of the weights.
"""

import jax
from jax import lax

from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.pipeline import Pipeline, StateLines
from pallas_kernels.mosaic.tiles import Tile
from pallas_kernels.mosaic.weights import Weights


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

    With g the gradient of h, summed over the lines that read it,

        g[i, j] = grad_h[i, j] + sum_k weights[i + 1, j - k, k] g[i + 1, j - k]

    grad_x = lam g, grad_lam = x g, grad_weights[k] = g h[i - 1, j + k]. The kernel's state is not g but the products
    weights * g that the next line reads: so each weight is read once, at its own pixel, and normalised once.

    The gradient of shared weights is (B, lines, C / channel block, 4, pixels) float32: a part for each channel block,
    with padding in slot 3.
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
            primitives.commit()  # every thread has read it before the first line writes there
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
