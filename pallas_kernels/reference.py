"""The `lax.scan` implementation, forward and backward. Kernels are tested against it; it runs on every device.

Line scans read the maps of a line from arrays. A low-rank propagation makes those of a few lines at a time; forward and
backward then scan over blocks, and over the lines of a block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.checks import state_dtype
from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.stability import normalise
from pallas_kernels.up_projection import UpProjection
from pallas_kernels.walk import Walk, gathered, spread

_SLOTS = range(3)
# Of the maps that a low-rank walk makes at a time: they should stay in the cache of a core.
_BLOCK_BYTES = 2**20


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
    states = []
    for d, direction in enumerate(directions):
        walk = Walk(direction, x.shape, chunk)
        given = _given(walk, weights, lam, d)
        step, start = _forward(walk, x, from_logits)
        (_, h), _ = lax.scan(lambda carry, i, step=step, given=given: step(carry, (i, *given(i))), start, walk.indices)
        states.append(walk.whole(h))
    return jnp.stack(states, axis=1)


def scan_backward(
    x: jax.Array, weights: jax.Array, lam: jax.Array, h: jax.Array, grad_h: jax.Array, *, directions: Sequence[str],
    chunk: int | None, from_logits: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of x, weights (or logits) and lam, each in its own dtype, by scans of `grad_h` in reverse order.

    `h` and `grad_h` are (B, D, H, W, C); the rest is as in `scan_forward`.
    """
    grad_x = jnp.zeros_like(x, state_dtype(x))
    grad_weights, grad_lam = jnp.zeros_like(weights), jnp.zeros_like(lam)
    for d, direction in enumerate(directions):
        walk = Walk(direction, x.shape, chunk)
        given = _given(walk, weights, lam, d)
        step, start = _backward(walk, x, h[:, d], grad_x, from_logits)
        grad_view = walk.chunks(grad_h[:, d])

        def put(carry, index, walk=walk, given=given, step=step, grad_view=grad_view, d=d):
            carry, (grad_w, grad_lam) = carry
            carry, (*of_slots, of_lam) = step(carry, (index, walk.line(grad_view, index), *given(index)))
            for slot, line in enumerate(of_slots):
                grad_w = walk.put(grad_w, line, index, d, slot)
            return (carry, (grad_w, walk.put(grad_lam, of_lam, index, d))), None

        start = start, (walk.chunks(grad_weights), walk.chunks(grad_lam))
        ((*_, grad_x), views), _ = lax.scan(put, start, walk.indices, reverse=True)
        grad_x, grad_weights, grad_lam = (walk.whole(view) for view in (grad_x, *views))
    return grad_x.astype(x.dtype), grad_weights, grad_lam


def low_rank_forward(
    x: jax.Array, proxy: jax.Array, up: UpProjection, merge: jax.Array, *, chunk: int | None, keep: bool
) -> tuple[jax.Array, tuple]:
    """y of `propagate_low_rank`, and h of the four directions, (B, H, W, C) in x's dtype (empty unless `keep`).

    The logits and lam of some lines are made when a walk comes to them, so they are never whole in memory.
    """
    dtype = state_dtype(x)
    y, states = jnp.zeros_like(x, dtype), []
    for d, direction in enumerate(DIRECTIONS):
        walk = Walk(direction, x.shape, chunk)
        step, start = _forward(walk, x, from_logits=True)
        columns = _columns(up, d)[:-1]  # without the gate's

        def make(carry, block, step=step, columns=columns):
            indices, proxies = block
            maps = [_product(proxies, column).astype(dtype) for column in columns]
            return lax.scan(step, carry, (indices, *maps))

        (_, h), _ = lax.scan(make, start, _blocks(walk, up, proxy))
        h = walk.whole(h)
        y += merge[d].astype(dtype) * _product(proxy, up.gate[:, d]).astype(dtype) * h.astype(dtype)
        states.append(h)
    if up.skip is not None:
        y += _product(proxy.astype(dtype), _merged_skip(up.skip, merge, dtype)) * x.astype(dtype)
    return y.astype(x.dtype), tuple(states) if keep else ()


def low_rank_backward(
    x: jax.Array, proxy: jax.Array, up: UpProjection, merge: jax.Array, states: tuple, grad_y: jax.Array, *,
    chunk: int | None,
) -> tuple[jax.Array, jax.Array, UpProjection, jax.Array]:  # fmt: skip
    """Gradients of x (in its dtype), and of proxy, up and merge (float32; float64 for float64 x).

    The gradients of the maps of some lines are contracted at once, with the up-projection and with the proxy.
    """
    dtype = state_dtype(x)
    # Without the barrier XLA takes the gate's maps from the forward pass and keeps them in memory until then.
    x, proxy, up, grad_y = lax.optimization_barrier((x, proxy, up, grad_y))
    wide_proxy, merge = proxy.astype(dtype), merge.astype(dtype)
    wide_up: Any = jax.tree.map(lambda columns: columns.astype(dtype), up)
    grad_x, grad_proxy, of_skip = jnp.zeros_like(x, dtype), jnp.zeros_like(wide_proxy), None
    of_columns = []  # for each direction; that of gate and skip is for merge = 1
    if up.skip is not None:
        column, of_map = _merged_skip(up.skip, merge, dtype), grad_y.astype(dtype) * x.astype(dtype)
        grad_x += _product(wide_proxy, column) * grad_y.astype(dtype)
        grad_proxy += _product(of_map, column.T)
        of_skip = _outer(wide_proxy, of_map)
    for d, direction in enumerate(DIRECTIONS):
        walk = Walk(direction, x.shape, chunk)
        step, start = _backward(walk, x, states[d], grad_x, from_logits=True)
        h_view, grad_view = walk.chunks(states[d]), walk.chunks(grad_y)
        columns, wide_columns = _columns(up, d), _columns(wide_up, d)
        wide_columns[-1] *= merge[d]

        def ungate(carry, line, walk=walk, step=step, h_view=h_view, grad_view=grad_view, merge=merge[d]):
            index, *maps, gate = line
            grad_line = walk.line(grad_view, index).astype(dtype)
            carry, of_maps = step(carry, (index, merge * gate * grad_line, *maps))
            return carry, (*of_maps, grad_line * walk.line(h_view, index).astype(dtype))

        def contract(carry, block, ungate=ungate, columns=columns, wide_columns=wide_columns):
            carry, sums = carry
            indices, proxies = block
            maps = [_product(proxies, column).astype(dtype) for column in columns]
            carry, of_maps = lax.scan(ungate, carry, (indices, *maps), reverse=True)
            proxies = proxies.astype(dtype)
            sums = [total + _outer(proxies, grad) for total, grad in zip(sums, of_maps, strict=True)]
            products = [_product(grad, column.T) for grad, column in zip(of_maps, wide_columns, strict=True)]
            return (carry, sums), sum(products[1:], products[0])

        start = start, [jnp.zeros_like(column) for column in wide_columns]
        blocks = _blocks(walk, up, proxy)
        ((*_, grad_x), sums), of_proxies = lax.scan(contract, start, blocks, reverse=True)
        grad_x = walk.whole(grad_x)
        grad_proxy += walk.in_place(of_proxies.reshape(walk.lines, *of_proxies.shape[2:]))
        of_columns.append([jnp.stack(sums[:3], axis=1), *sums[3:]])
    logits, lam, gate = (jnp.stack(grads, axis=1) for grads in zip(*of_columns, strict=True))
    merge = merge.reshape(1, 4, 1)
    grad_merge = jnp.sum(gate * wide_up.gate, axis=(0, 2))
    if of_skip is not None:
        grad_merge += jnp.sum(of_skip[:, None] * wide_up.skip, axis=(0, 2))
        of_skip = merge * of_skip[:, None]
    return grad_x.astype(x.dtype), grad_proxy, UpProjection(logits, lam, merge * gate, of_skip), grad_merge


def _blocks(walk: Walk, up: UpProjection, proxy: jax.Array) -> tuple[jax.Array, ...]:
    """The indices of the lines, (blocks, lines of a block), and their proxies, (blocks, lines of a block, B, ..., S).

    A block has as many lines as keep its maps small; few lines of a small map would make many small products.
    """
    batch, height, width, channels = walk.shape
    pixels = height * width // walk.lines * (batch if isinstance(batch, int) else 1)  # of a line
    limit = _BLOCK_BYTES // (pixels * (3 * up.logits.shape[-1] + 2 * channels) * state_dtype(proxy).itemsize)
    lines = max(n for n in range(1, walk.lines + 1) if n == 1 or (n <= limit and walk.lines % n == 0))
    # Without the barrier XLA may put the products first, and then copy maps instead of proxies into the walk's order.
    ordered = lax.optimization_barrier(walk.ordered(proxy))
    return tuple(array.reshape(walk.lines // lines, lines, *array.shape[1:]) for array in (walk.indices, ordered))


def _columns(up: UpProjection, d: int) -> list[jax.Array]:
    """The matrices of the three logits, lam and gate for one direction: three (S, C_w) and two (S, C)."""
    return [*(up.logits[:, d, slot] for slot in _SLOTS), up.lam[:, d], up.gate[:, d]]


def _merged_skip(skip: jax.Array, merge: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The skips of the four directions multiply the same x: (S, 4, C) summed to the (S, C) of one map."""
    return jnp.sum(merge.astype(dtype).reshape(1, 4, 1) * skip.astype(dtype), axis=1)


def _product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """(..., S) times (S, C)."""
    return lax.dot_general(rows, matrix, (((rows.ndim - 1,), (0,)), ((), ())))


def _outer(rows: jax.Array, grads: jax.Array) -> jax.Array:
    """The sum over pixels of the outer products of (..., S) and (..., C): the gradient (S, C) of a matrix."""
    pixels = tuple(range(rows.ndim - 1))
    return lax.dot_general(rows, grads, ((pixels, pixels), ((), ())))


def _given(walk: Walk, weights: jax.Array, lam: jax.Array, d: int) -> Callable:
    """The function from a line's index to its three slots of weights (or logits) and its lam."""
    weight_view, lam_view = walk.chunks(weights), walk.chunks(lam)
    return lambda index: (*(walk.line(weight_view, index, d, slot) for slot in _SLOTS), walk.line(lam_view, index, d))


def _forward(walk: Walk, x: jax.Array, from_logits: bool) -> tuple[Callable, tuple]:
    """The step of a scan over lines that computes h of one direction, and its first carry.

    The step takes the line's index, its three slots of weights (or logits) and its lam. The carry is the line before in
    its halo, and h as `Walk.chunks` gives it.
    """
    dtype = state_dtype(x)
    x_view = walk.chunks(x)

    def step(carry, line):
        halo, h = carry
        index, *slots, lam = line
        gated = lam.astype(dtype) * walk.line(x_view, index).astype(dtype)
        line = _mix(walk, _weight_lines(walk, slots, dtype, from_logits), halo) + gated
        return (walk.fill(halo, line), walk.put(h, line, index)), None

    return step, (walk.halo(walk.line(x_view, 0).astype(dtype)), jnp.zeros_like(x_view))


def _backward(walk: Walk, x: jax.Array, h: jax.Array, grad_x: jax.Array, from_logits: bool) -> tuple[Callable, tuple]:
    """The step of a scan in reverse order that is the gradient of `_forward`, and its first carry.

    The step takes the line's index, the gradient of its h, its three slots and its lam. It returns the gradients of the
    slots and of lam. The last item of the carry is `grad_x`, to which it adds.
    """
    dtype = state_dtype(x)
    x_view, h_view = walk.chunks(x), walk.chunks(h)

    def step(carry, line):
        passed, before, grad_x = carry
        index, grad_line, *slots, lam = line
        total = grad_line.astype(dtype) + _unmix(walk, passed)
        weights, to_slots = jax.vjp(lambda lines: _weight_lines(walk, lines, dtype, from_logits), slots)
        before = walk.fill(before, _line_before(walk, h_view, index, dtype))
        of_weights = [gathered(total * line, weights[0].shape[-1]) for line in walk.neighbours(before)]
        of_maps = *to_slots(of_weights)[0], walk.line(x_view, index).astype(dtype) * total
        grad_x = walk.put(grad_x, walk.line(grad_x, index) + lam.astype(dtype) * total, index)
        return (_pass_back(walk, passed, weights, total), before, grad_x), of_maps

    halo = walk.halo(walk.line(x_view, 0).astype(dtype))
    return step, ([halo] * 3, halo, walk.chunks(grad_x))


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


def _weight_lines(walk: Walk, lines: Sequence[jax.Array], dtype: jnp.dtype, from_logits: bool) -> list[jax.Array]:
    """The three weights of a line in the state's dtype, from its weights or logits."""
    if not from_logits:
        return [line.astype(dtype) for line in lines]
    wide = (line.astype(state_dtype(line)) for line in lines)
    weights: Any = normalise(walk.pixel_axis, *wide)
    return [weight.astype(dtype) for weight in weights]
