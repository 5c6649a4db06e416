"""The `lax.scan` implementation, forward and backward. Kernels are tested against it; it runs on every device."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.checks import state_dtype
from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.stability import normalise
from pallas_kernels.up_projection import gradients_of_maps, maps_of
from pallas_kernels.walk import Walk, gathered, spread

_SLOTS = range(3)


def scan_forward(
    x: jax.Array, weights: jax.Array, lam: jax.Array, *, directions: Sequence[str], chunk: int | None, from_logits: bool
) -> jax.Array:
    """h of line scans in D directions: (B, D, H, W, C) in x's dtype.

    Args:
        x: (B, H, W, C).
        weights: (B, H, W, D, 3, C_w), or their logits if `from_logits`.
        lam: (B, H, W, D, C).
        directions: D names.
        chunk: lines after which each scan restarts, or None.
        from_logits: whether `weights` are logits.
    """
    dtype = state_dtype(x)
    states = []
    for d, direction in enumerate(directions):
        walk = Walk(direction, x.shape, chunk)
        x_view, w_view, lam_view = (walk.chunks(array) for array in (x, weights, lam))

        def step(carry, index, walk=walk, x_view=x_view, w_view=w_view, lam_view=lam_view, d=d):
            halo, h = carry
            w_lines = _weight_lines(walk, _slot_lines(walk, w_view, index, d), dtype, from_logits)
            gated = walk.line(lam_view, index, d).astype(dtype) * walk.line(x_view, index).astype(dtype)
            line = _mix(walk, w_lines, halo) + gated
            return (walk.fill(halo, line), walk.put(h, line, index)), None

        start = walk.halo(walk.line(x_view, 0).astype(dtype)), jnp.zeros_like(x_view)
        (_, h), _ = lax.scan(step, start, jnp.arange(walk.lines))
        states.append(walk.whole(h))
    return jnp.stack(states, axis=1)


def scan_backward(
    x: jax.Array, weights: jax.Array, lam: jax.Array, h: jax.Array, grad_h: jax.Array, *, directions: Sequence[str],
    chunk: int | None, from_logits: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of x, weights (or logits) and lam, each in its own dtype, by scans of `grad_h` in reverse order.

    `h` and `grad_h` are (B, D, H, W, C); the rest is as in `scan_forward`.
    """
    dtype = state_dtype(x)
    grad_x, grad_w, grad_lam = jnp.zeros_like(x, dtype), jnp.zeros_like(weights), jnp.zeros_like(lam)
    for d, direction in enumerate(directions):
        walk = Walk(direction, x.shape, chunk)
        x_view, w_view, lam_view, h_view, grad_view = (
            walk.chunks(array) for array in (x, weights, lam, h[:, d], grad_h[:, d])
        )

        def step(
            carry, index, walk=walk, x_view=x_view, w_view=w_view, lam_view=lam_view, h_view=h_view,
            grad_view=grad_view, d=d,
        ):  # fmt: skip
            passed, before, grad_x, grad_w, grad_lam = carry
            total = walk.line(grad_view, index).astype(dtype) + _unmix(walk, passed)
            w_lines, to_given = jax.vjp(
                lambda lines: _weight_lines(walk, lines, dtype, from_logits), _slot_lines(walk, w_view, index, d)
            )
            before = walk.fill(before, _line_before(walk, h_view, index, dtype))
            of_weights = [gathered(total * line, weights.shape[-1]) for line in walk.neighbours(before)]
            for slot, line in enumerate(to_given(of_weights)[0]):
                grad_w = walk.put(grad_w, line, index, d, slot)
            of_x = walk.line(lam_view, index, d).astype(dtype) * total
            grad_x = walk.put(grad_x, walk.line(grad_x, index) + of_x, index)
            grad_lam = walk.put(grad_lam, walk.line(x_view, index).astype(dtype) * total, index, d)
            return (_pass_back(walk, passed, w_lines, total), before, grad_x, grad_w, grad_lam), None

        halo = walk.halo(walk.line(x_view, 0).astype(dtype))
        start = [halo] * 3, halo, *(walk.chunks(grad) for grad in (grad_x, grad_w, grad_lam))
        (_, _, *grads), _ = lax.scan(step, start, jnp.arange(walk.lines), reverse=True)
        grad_x, grad_w, grad_lam = (walk.whole(grad) for grad in grads)
    return grad_x.astype(x.dtype), grad_w, grad_lam


def low_rank_forward(x, proxy, up, merge, *, chunk: int | None, keep: bool) -> tuple[jax.Array, tuple]:
    """y of `propagate_low_rank`, and h of the four directions, (B, H, W, C) in x's dtype (empty unless `keep`)."""
    logits, lam, gate, skip = maps_of(proxy, up)
    h = scan_forward(x, logits, lam, directions=DIRECTIONS, chunk=chunk, from_logits=True)
    states = tuple(h[:, d] for d in range(4))
    return _merged(x, states, gate, skip, merge), states if keep else ()


def low_rank_backward(x, proxy, up, merge, states, grad_y, *, chunk: int | None) -> tuple:
    """Gradients of x (in its dtype) and of proxy, up and merge (float32; float64 for float64 arrays)."""
    logits, lam, gate, skip = maps_of(proxy, up)
    _, vjp = jax.vjp(_merged, x, states, gate, skip, merge)
    of_x, of_h, of_gate, of_skip, of_merge = vjp(grad_y)
    options: Any = dict(directions=DIRECTIONS, chunk=chunk, from_logits=True)
    grad_x, of_logits, of_lam = scan_backward(x, logits, lam, jnp.stack(states, 1), jnp.stack(of_h, 1), **options)
    of_proxy, of_up = gradients_of_maps(proxy, up, (of_logits, of_lam, of_gate, of_skip))
    return grad_x + of_x, of_proxy, of_up, of_merge.astype(state_dtype(x))


def _merged(x, states, gate, skip, merge):
    dtype = state_dtype(x)
    part = gate.astype(dtype) * jnp.stack(states, 3).astype(dtype)
    if skip is not None:
        part += skip.astype(dtype) * x[:, :, :, None].astype(dtype)
    return jnp.sum(merge.astype(dtype).reshape(1, 1, 1, 4, 1) * part, axis=3).astype(x.dtype)


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


def _slot_lines(walk: Walk, view: jax.Array, index, *direction: int) -> list[jax.Array]:
    return [walk.line(view, index, *direction, slot) for slot in _SLOTS]


def _weight_lines(walk: Walk, lines: Sequence[jax.Array], dtype: jnp.dtype, from_logits: bool) -> list[jax.Array]:
    """The three weights of a line in the state's dtype, from its weights or logits."""
    if not from_logits:
        return [line.astype(dtype) for line in lines]
    wide = (line.astype(state_dtype(line)) for line in lines)
    weights: Any = normalise(walk.pixel_axis, *wide)
    return [weight.astype(dtype) for weight in weights]
