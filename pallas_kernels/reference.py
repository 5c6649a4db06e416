"""The `lax.scan` implementation, forward and backward: the oracle, and what runs where there is no kernel.

Maps are laid out as (k, n, B, P, ...): k lines of each of n chunks, P pixels on a line. The scan runs over the first
axis, so that chunks advance together.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.checks import state_dtype
from pallas_kernels.directions import DIRECTIONS, walked_axis, walks_back
from pallas_kernels.stability import row_stochastic


def scan_forward(x: jax.Array, weights: jax.Array, lam: jax.Array, direction: str, chunk: int | None) -> jax.Array:
    """h of `line_scan`: (B, H, W, C) in x's dtype."""
    dtype = state_dtype(x)
    # (k, n, B, P, C), weights (k, n, B, P, 3, C_w)
    lines = [_to_lines(array, direction, chunk) for array in (x, weights, lam)]

    def step(previous, line):
        x_line, w_line, lam_line = line
        h = _gather(w_line.astype(dtype), previous) + lam_line.astype(dtype) * x_line.astype(dtype)
        return h, h.astype(x.dtype)

    # The first line has no predecessor: it starts the state, and its weights are never read.
    first = lines[2][0].astype(dtype) * lines[0][0].astype(dtype)
    _, rest = lax.scan(step, first, tuple(array[1:] for array in lines))
    return _from_lines(jnp.concatenate([first.astype(x.dtype)[None], rest]), x.shape, direction)


def scan_backward(
    x: jax.Array, weights: jax.Array, lam: jax.Array, h: jax.Array, grad_h: jax.Array, direction: str, chunk: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, weights and lam, each in its own dtype: the scan walked backwards on `grad_h`."""
    dtype = state_dtype(x)
    grad_lines, w_lines, h_lines = (_to_lines(array, direction, chunk) for array in (grad_h, weights, h))

    def step(following, line):
        grad_line, w_following = line
        total = grad_line.astype(dtype) + _scatter(w_following.astype(dtype), following)
        return total, total

    last = grad_lines[-1].astype(dtype)
    _, totals = lax.scan(step, last, (grad_lines[:-1], w_lines[1:]), reverse=True)
    totals = jnp.concatenate([totals, last[None]])  # dL/dh, (k, n, B, P, C)

    weight_channels = weights.shape[-1]
    neighbours = jnp.stack(_neighbours(h_lines[:-1].astype(dtype)), axis=-2)
    products = totals[1:, ..., None, :] * neighbours
    grad_w = products.reshape(*products.shape[:-1], weight_channels, x.shape[-1] // weight_channels).sum(-1)
    grad_w = jnp.concatenate([jnp.zeros_like(grad_w, shape=(1, *w_lines.shape[1:])), grad_w])

    total = _from_lines(totals, x.shape, direction)
    grad_x = (lam.astype(dtype) * total).astype(x.dtype)
    grad_lam = (x.astype(dtype) * total).astype(lam.dtype)
    return grad_x, _from_lines(grad_w, weights.shape, direction).astype(weights.dtype), grad_lam


def _neighbours(h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h at the pixel of smaller index, the same, and larger index on its line (axis -2); 0 outside."""
    padded = jnp.pad(h, [(0, 0)] * (h.ndim - 2) + [(1, 1), (0, 0)])
    return padded[..., :-2, :], h, padded[..., 2:, :]


def _gather(w: jax.Array, h: jax.Array) -> jax.Array:
    """sum_k w[j, k] * h[j + k - 1] on a line; w (..., P, 3, C_w), h (..., P, C)."""
    w = _spread(w, h.shape[-1])
    smaller, same, larger = _neighbours(h)
    return w[..., 1, :] * same + (w[..., 0, :] * smaller + w[..., 2, :] * larger)


def _scatter(w: jax.Array, g: jax.Array) -> jax.Array:
    """The transpose of `_gather`: what h[j] gets back from the pixels that read it."""
    w = _spread(w, g.shape[-1])
    smaller, same, larger = (w[..., slot, :] * g for slot in range(3))
    # Slot 0 of pixel j read h[j - 1]: h[j] gets its share back from pixel j + 1; slot 2 likewise from pixel j - 1.
    return same + (_neighbours(smaller)[2] + _neighbours(larger)[0])


def _spread(w: jax.Array, channels: int) -> jax.Array:
    """Weights of one line for every channel: channel c uses weight channel c // (C / C_w)."""
    weight_channels = w.shape[-1]
    return w if weight_channels in (1, channels) else jnp.repeat(w, channels // weight_channels, axis=-1)


def _to_lines(array: jax.Array, direction: str, chunk: int | None) -> jax.Array:
    """(B, H, W, ...) to (k, n, B, P, ...), lines in the order of the walk; zeros fill the last chunk."""
    array = jnp.moveaxis(array, walked_axis(direction), 0)
    if walks_back(direction):
        array = array[::-1]
    length = array.shape[0]
    lines = min(chunk or length, length)
    chunks = -(-length // lines)
    array = jnp.pad(array, [(0, chunks * lines - length)] + [(0, 0)] * (array.ndim - 1))
    return jnp.swapaxes(array.reshape(chunks, lines, *array.shape[1:]), 0, 1)


def _from_lines(array: jax.Array, shape: tuple[int, ...], direction: str) -> jax.Array:
    """The inverse of `_to_lines`, to an array of `shape`."""
    axis = walked_axis(direction)
    array = jnp.swapaxes(array, 0, 1)
    array = array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])[: shape[axis]]
    if walks_back(direction):
        array = array[::-1]
    return jnp.moveaxis(array, 0, axis)


def propagation_forward(x, logits, lam, gate, skip, merge, chunk: int | None) -> tuple[jax.Array, jax.Array]:
    """y of the aligned `propagate`, and the four h, (4, B, H, W, C) in x's dtype."""
    dtype = state_dtype(x)
    y, states = jnp.zeros_like(x, dtype), []
    for d, direction in enumerate(DIRECTIONS):
        weights = row_stochastic(logits[:, :, :, d], direction=direction)
        h = scan_forward(x, weights, lam[:, :, :, d], direction, chunk)
        part = gate[:, :, :, d].astype(dtype) * h.astype(dtype)
        if skip is not None:
            part = part + skip[:, :, :, d].astype(dtype) * x.astype(dtype)
        y = y + merge[d].astype(dtype) * part
        states.append(h)
    return y.astype(x.dtype), jnp.stack(states)


def propagation_backward(x, logits, lam, gate, skip, merge, h, grad_y, chunk: int | None) -> tuple:
    """Gradients of x, logits, lam, gate, skip (None where skip is) and merge, each in its own dtype."""
    dtype = state_dtype(x)
    wide_x, grad_y = x.astype(dtype), grad_y.astype(dtype)
    grad_x, grad_logits, grad_lam, grad_gate, grad_skip, grad_merge = jnp.zeros_like(wide_x), [], [], [], [], []
    for d, direction in enumerate(DIRECTIONS):
        weights, normalise = jax.vjp(
            lambda array, way=direction: row_stochastic(array, direction=way), logits[:, :, :, d]
        )
        scaled = merge[d].astype(dtype) * grad_y
        wide_h, wide_gate = h[d].astype(dtype), gate[:, :, :, d].astype(dtype)
        part = wide_gate * wide_h
        if skip is not None:
            wide_skip = skip[:, :, :, d].astype(dtype)
            part = part + wide_skip * wide_x
            grad_x = grad_x + scaled * wide_skip
            grad_skip.append(scaled * wide_x)
        # The gradient enters the backward scan in the state's dtype: it has not been rounded to x's.
        g_x, g_weights, g_lam = scan_backward(
            wide_x, weights, lam[:, :, :, d], h[d], scaled * wide_gate, direction, chunk
        )
        grad_x = grad_x + g_x
        grad_logits.append(normalise(g_weights)[0])
        grad_lam.append(g_lam)
        grad_gate.append(scaled * wide_h)
        grad_merge.append(jnp.sum(grad_y * part))

    def stacked(parts, like):
        return jnp.stack(parts, axis=3).astype(like.dtype)

    return (
        grad_x.astype(x.dtype),
        stacked(grad_logits, logits),
        stacked(grad_lam, lam),
        stacked(grad_gate, gate),
        None if skip is None else stacked(grad_skip, skip),
        jnp.stack(grad_merge).astype(merge.dtype),
    )
