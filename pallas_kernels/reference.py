"""The `lax.scan` implementation, forward and backward. Kernels are tested against it; it runs on every device."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.checks import state_dtype
from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.stability import normalise
from pallas_kernels.walk import Walk, gathered, spread

_SLOTS = range(3)


def scan_forward(
    x: jax.Array, weights: jax.Array, lam: jax.Array, direction: str, chunk: int | None, *, from_logits: bool
) -> jax.Array:
    """h of `line_scan`, or of `line_scan_from_logits` if `weights` are logits: (B, H, W, C) in x's dtype."""
    walk = Walk(direction, x.shape, chunk)
    dtype = state_dtype(x)
    x_view, w_view, lam_view = (walk.chunks(array) for array in (x, weights, lam))

    def step(carry, index):
        halo, h = carry
        w_lines = _weight_lines(walk, _slot_lines(walk, w_view, index), dtype, from_logits)
        gated = walk.line(lam_view, index).astype(dtype) * walk.line(x_view, index).astype(dtype)
        line = _mix(walk, w_lines, halo) + gated
        return (walk.fill(halo, line), walk.put(h, line, index)), None

    start = walk.halo(walk.line(x_view, 0).astype(dtype)), jnp.zeros_like(x_view)
    (_, h), _ = lax.scan(step, start, jnp.arange(walk.lines))
    return walk.whole(h)


def scan_backward(
    x: jax.Array, weights: jax.Array, lam: jax.Array, h: jax.Array, grad_h: jax.Array, direction: str,
    chunk: int | None, *, from_logits: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of x, weights (or logits) and lam, each in its own dtype, by a scan of `grad_h` in reverse order."""
    walk = Walk(direction, x.shape, chunk)
    dtype = state_dtype(x)
    x_view, w_view, lam_view, h_view, grad_view = (walk.chunks(array) for array in (x, weights, lam, h, grad_h))

    def step(carry, index):
        passed, before, grad_x, grad_w, grad_lam = carry
        total = walk.line(grad_view, index).astype(dtype) + _unmix(walk, passed)
        w_lines, to_given = jax.vjp(
            lambda lines: _weight_lines(walk, lines, dtype, from_logits), _slot_lines(walk, w_view, index)
        )
        before = walk.fill(before, _line_before(walk, h_view, index, dtype))
        of_weights = [gathered(total * line, weights.shape[-1]) for line in walk.neighbours(before)]
        for slot, line in enumerate(to_given(of_weights)[0]):
            grad_w = walk.put(grad_w, line, index, slot)
        grad_x = walk.put(grad_x, walk.line(lam_view, index).astype(dtype) * total, index)
        grad_lam = walk.put(grad_lam, walk.line(x_view, index).astype(dtype) * total, index)
        return (_pass_back(walk, passed, w_lines, total), before, grad_x, grad_w, grad_lam), None

    halo = walk.halo(walk.line(x_view, 0).astype(dtype))
    start = [halo] * 3, halo, *(jnp.zeros_like(view) for view in (x_view, w_view, lam_view))
    (_, _, *grads), _ = lax.scan(step, start, jnp.arange(walk.lines), reverse=True)
    grad_x, grad_weights, grad_lam = (walk.whole(grad) for grad in grads)
    return grad_x, grad_weights, grad_lam


def propagation_forward(x, logits, lam, gate, skip, merge, chunk: int | None, keep: bool) -> tuple[jax.Array, tuple]:
    """y of the aligned `propagate`, and h of the four directions, (B, H, W, C) in x's dtype (empty unless `keep`)."""
    dtype = state_dtype(x)
    merge = merge.astype(dtype)
    y, states = jnp.zeros_like(x, dtype), []
    for d, direction in enumerate(DIRECTIONS):
        walk = Walk(direction, x.shape, chunk)
        x_view, logit_view = walk.chunks(x), walk.chunks(logits)
        views = [None if array is None else walk.chunks(array) for array in (lam, gate, skip)]

        def step(carry, index, walk=walk, x_view=x_view, logit_view=logit_view, views=views, d=d):
            halo, h, y = carry
            x_line = walk.line(x_view, index).astype(dtype)
            lam_line, gate_line, skip_line = _map_lines(walk, views, index, d, dtype)
            line = (
                _mix(walk, _weight_lines(walk, _slot_lines(walk, logit_view, index, d), dtype, True), halo)
                + lam_line * x_line
            )
            # The gate multiplies h as it is kept, rounded, because the backward pass will read it so.
            part = gate_line * line.astype(x.dtype).astype(dtype)
            if skip_line is not None:
                part = part + skip_line * x_line
            y = walk.put(y, walk.line(y, index) + merge[d] * part, index)
            return (walk.fill(halo, line), walk.put(h, line, index), y), None

        start = walk.halo(walk.line(x_view, 0).astype(dtype)), jnp.zeros_like(x_view), walk.chunks(y)
        (_, h, y), _ = lax.scan(step, start, jnp.arange(walk.lines))
        y = walk.whole(y)
        states.append(walk.whole(h))
    return y.astype(x.dtype), tuple(states) if keep else ()


def propagation_backward(x, logits, lam, gate, skip, merge, h, grad_y, chunk: int | None) -> tuple:
    """Gradients of x, logits, lam, gate, skip (None where skip is) and merge, each in its own dtype."""
    dtype = state_dtype(x)
    wide_merge = merge.astype(dtype)
    grad_x, grad_merge = jnp.zeros_like(x, dtype), []
    grads = [None if array is None else jnp.zeros_like(array) for array in (logits, lam, gate, skip)]
    for d, direction in enumerate(DIRECTIONS):
        walk = Walk(direction, x.shape, chunk)
        x_view, h_view, grad_view, logit_view = (walk.chunks(array) for array in (x, h[d], grad_y, logits))
        views = [None if array is None else walk.chunks(array) for array in (lam, gate, skip)]

        def step(
            carry, index, walk=walk, x_view=x_view, h_view=h_view, grad_view=grad_view, logit_view=logit_view,
            views=views, d=d,
        ):  # fmt: skip
            passed, before, of_merge, grad_x, (grad_logits, *grad_maps) = carry
            x_line, h_line, grad_line = (walk.line(view, index).astype(dtype) for view in (x_view, h_view, grad_view))
            lam_line, gate_line, skip_line = _map_lines(walk, views, index, d, dtype)
            weights, to_logits = jax.vjp(
                lambda lines: _weight_lines(walk, lines, dtype, True), _slot_lines(walk, logit_view, index, d)
            )
            scaled = wide_merge[d] * grad_line
            total = scaled * gate_line + _unmix(walk, passed)  # the gradient of h
            to_x, part = lam_line * total, gate_line * h_line
            if skip_line is not None:
                to_x, part = to_x + skip_line * scaled, part + skip_line * x_line

            before = walk.fill(before, _line_before(walk, h_view, index, dtype))
            of_weights = [gathered(total * line, logits.shape[-1]) for line in walk.neighbours(before)]
            for slot, line in enumerate(to_logits(of_weights)[0]):
                grad_logits = walk.put(grad_logits, line, index, d, slot)
            of_maps = x_line * total, h_line * scaled, x_line * scaled
            grad_maps = [
                None if grad is None else walk.put(grad, line, index, d)
                for grad, line in zip(grad_maps, of_maps, strict=True)
            ]
            grad_x = walk.put(grad_x, walk.line(grad_x, index) + to_x, index)
            passed = _pass_back(walk, passed, weights, total)
            return (passed, before, of_merge + grad_line * part, grad_x, [grad_logits, *grad_maps]), None

        zero = jnp.zeros_like(walk.line(x_view, 0), dtype)
        halo = walk.halo(zero)
        grads = [None if grad is None else walk.chunks(grad) for grad in grads]
        start = [halo] * 3, halo, zero, walk.chunks(grad_x), grads
        (_, _, of_merge, grad_x, grads), _ = lax.scan(step, start, jnp.arange(walk.lines), reverse=True)
        grad_x = walk.whole(grad_x)
        grads = [None if grad is None else walk.whole(grad) for grad in grads]
        grad_merge.append(jnp.sum(of_merge))
    return grad_x.astype(x.dtype), *grads, jnp.stack(grad_merge).astype(merge.dtype)


def _mix(walk: Walk, weights: Sequence[jax.Array], halo: jax.Array) -> jax.Array:
    """The tridiagonal mix of the line in `halo`."""
    channels = halo.shape[-1]
    smaller, same, larger = (spread(w, channels) * h for w, h in zip(weights, walk.neighbours(halo), strict=True))
    return same + (smaller + larger)


def _pass_back(walk: Walk, passed: list, weights: Sequence[jax.Array], total: jax.Array) -> list[jax.Array]:
    """The three products of weights and gradient that go to the line before, each still at the pixel that read h."""
    channels = total.shape[-1]
    return [walk.fill(halo, spread(w, channels) * total) for halo, w in zip(passed, weights, strict=True)]


def _unmix(walk: Walk, passed: list[jax.Array]) -> jax.Array:
    """The transpose of `_mix`: slot 0 of pixel j read h[j - 1], so pixel j gets slot 0 of pixel j + 1, and likewise."""
    smaller, same, larger = (walk.neighbours(halo)[2 - slot] for slot, halo in enumerate(passed))
    return same + (smaller + larger)


def _line_before(walk: Walk, h_view: jax.Array, index, dtype: jnp.dtype) -> jax.Array:
    """h of the line before line `index`; zeros for the first line."""
    line = walk.line(h_view, jnp.maximum(index - 1, 0)).astype(dtype)
    return jnp.where(index == 0, jnp.zeros_like(line), line)


def _map_lines(walk: Walk, views: Sequence[jax.Array | None], index, d: int, dtype: jnp.dtype) -> list:
    return [None if view is None else walk.line(view, index, d).astype(dtype) for view in views]


def _slot_lines(walk: Walk, view: jax.Array, index, *direction: int) -> list[jax.Array]:
    return [walk.line(view, index, *direction, slot) for slot in _SLOTS]


def _weight_lines(walk: Walk, lines: Sequence[jax.Array], dtype: jnp.dtype, from_logits: bool) -> list[jax.Array]:
    """The three weights of a line in the state's dtype, from its weights or logits."""
    if not from_logits:
        return [line.astype(dtype) for line in lines]
    wide = (line.astype(state_dtype(line)) for line in lines)
    weights: Any = normalise(walk.pixel_axis, *wide)
    return [weight.astype(dtype) for weight in weights]
