"""The recurrences of Mamba and Mamba-2 over sequences, in chunks of tokens.

`selective_scan` and `grouped_scan` say in which form each runs. Where a length is no multiple of the chunk, tokens with
step 0 are added, which leave the state as it is.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.checks import state_dtype

# Tokens of a chunk. Measured on a CPU (2 sequences of 1024 and 4096 tokens, 640 channels, float32): other powers of two
# are not faster by more than the noise. One associative scan over 1024 tokens takes 13 times as long as
# `selective_scan`, with gradients 5 times.
SELECTIVE_CHUNK = 64
GROUPED_CHUNK = 64


def both_ways(tokens: jax.Array) -> jax.Array:
    """Returns (2 B, L, ...): the sequences (B, L, ...), then the same reversed."""
    return jnp.concatenate([tokens, tokens[:, ::-1]])


def added(tokens: jax.Array) -> jax.Array:
    """Returns (B, L, ...): of (2 B, L, ...), the first half plus the second half turned back."""
    one, other = jnp.split(tokens, 2)
    return one + other[:, ::-1]


def causal_conv(tokens: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Convolves each channel with the tokens up to its own: (B, L, C) to (B, L, C).

    Args:
        tokens: (B, L, C).
        kernel: (taps, C); the last tap is the token itself.
        bias: (C,).
    """
    taps, length = kernel.shape[0], tokens.shape[1]
    padded = jnp.pad(tokens, [(0, 0), (taps - 1, 0), (0, 0)])
    return sum(padded[:, tap : tap + length] * kernel[tap][None, None] for tap in range(taps)) + bias[None, None]


def selective_scan(
    u: jax.Array, step: jax.Array, rate: jax.Array, write: jax.Array, read: jax.Array, *, chunk: int | None = None
) -> jax.Array:
    """Mamba's recurrence (arXiv 2312.00752, equation 2 with section 3.6): each channel has a state of N numbers.

        h_t = exp(-step_t rate) h_{t-1} + step_t write_t u_t,    y_t = read_t . h_t

    Chunks run one after another. Within a chunk, `jax.lax.associative_scan` runs all tokens at once; on a CPU, which
    would only have more work by that, one runs after another. The backward pass keeps the states between chunks and
    computes those inside again.

    Args:
        u: (B, L, C).
        step: (B, L, C), at least 0.
        rate: (C, N), above 0.
        write, read: (B, L, N).
        chunk: tokens of a chunk; None: `SELECTIVE_CHUNK`.

    Returns:
        y, (B, L, C) float32; float64 where u is.
    """
    dtype, length = state_dtype(u), u.shape[1]
    chunk = min(SELECTIVE_CHUNK if chunk is None else chunk, length)
    # (B, L, ...) to (L / chunk, chunk, B, ...)
    inputs = tuple(_chunks(array.astype(dtype).swapaxes(0, 1), 0, chunk) for array in (u, step, write, read))
    rate = rate.astype(dtype)
    start = jnp.zeros((u.shape[0], *rate.shape), dtype)
    # y: (L / chunk, chunk, B, C)
    _, y = jax.lax.scan(lambda state, of_chunk: _advance(state, rate, *of_chunk), start, inputs)
    return y.reshape(-1, *y.shape[2:])[:length].swapaxes(0, 1)


@jax.custom_vjp
def _advance(state, rate, u, step, write, read):
    """The state (B, C, N) after a chunk, and y (chunk, B, C), from the state before it."""
    arrays = state, rate, u, step, write, read
    return jax.lax.platform_dependent(*arrays, cpu=_one_by_one, default=_at_once)


def _advance_backward(arrays, grads):
    def pulled(function, *arrays_and_grads):
        return jax.vjp(function, *arrays_and_grads[:-2])[1](arrays_and_grads[-2:])

    forms = dict(cpu=functools.partial(pulled, _one_by_one), default=functools.partial(pulled, _at_once))
    return jax.lax.platform_dependent(*arrays, *grads, **forms)


_advance.defvjp(lambda *arrays: (_advance(*arrays), arrays), _advance_backward)


def _one_by_one(state, rate, *inputs):
    """`_advance` by a scan over the tokens."""

    def advance(state, of_token):
        u, step, write, read = of_token
        state = jnp.exp(-step[..., None] * rate[None]) * state + (step * u)[..., None] * write[:, None]
        return state, jnp.einsum("bcn,bn->bc", state, read)

    return jax.lax.scan(advance, state, inputs)


def _at_once(state, rate, u, step, write, read):
    """`_advance` by an associative scan over the tokens."""
    decay = jnp.exp(-step[..., None] * rate[None, None])  # (chunk, B, C, N)
    decay, states = jax.lax.associative_scan(_in_turn, (decay, (step * u)[..., None] * write[:, :, None]))
    states += decay * state[None]
    return states[-1], jnp.einsum("lbcn,lbn->lbc", states, read)


def _in_turn(one: tuple, two: tuple) -> tuple[jax.Array, jax.Array]:
    """The step h -> decay h + added that does step `one`, then step `two`; each is (decay, added)."""
    return one[0] * two[0], two[0] * one[1] + two[1]


def _chunks(array: jax.Array, axis: int, chunk: int) -> jax.Array:
    """Returns the array with an axis L split into (L / chunk, chunk), after zeros are added at its end."""
    added = [(0, -array.shape[axis] % chunk if each == axis else 0) for each in range(array.ndim)]
    return jnp.pad(array, added).reshape(*array.shape[:axis], -1, chunk, *array.shape[axis + 1 :])


@jax.checkpoint
def _grouped(u, step, rate, write, read):
    """`grouped_scan` of (B, K, Q, ...): K chunks of Q tokens."""
    dtype = step.dtype
    heads, groups = step.shape[3], write.shape[3]
    # The logarithm of the decay from the start of a chunk to each token, (B, K, Q, heads).
    total = jnp.cumsum(-step * rate[None, None, None], axis=2)

    def of_heads(array: jax.Array) -> jax.Array:
        return jnp.repeat(array, heads // groups, axis=3)

    def product(equation: str, *arrays: jax.Array) -> jax.Array:
        return jnp.einsum(equation, *(array.astype(u.dtype) for array in arrays), preferred_element_type=dtype)

    # Within a chunk, as attention with decaying weights: (B, K, heads, Q, Q).
    by_head = total.swapaxes(2, 3)
    earlier = jnp.tril(jnp.ones((u.shape[2],) * 2, bool))[None, None, None]
    decay = jnp.exp(jnp.where(earlier, by_head[..., :, None] - by_head[..., None, :], -jnp.inf))
    scores = jnp.repeat(product("bkqgn,bksgn->bkgqs", read, write), heads // groups, axis=2)
    weights = scores * decay * step.swapaxes(2, 3)[..., None, :]
    y = product("bkhqs,bkshp->bkqhp", weights, u)

    # From chunk to chunk: what each adds to the state, and the state that it starts with, (B, K, heads, P, N).
    to_end = jnp.exp(total[:, :, -1:] - total) * step
    adds = product("bkshp,bkshn->bkhpn", u * to_end[..., None].astype(u.dtype), of_heads(write))
    keeps = jnp.exp(total[:, :, -1])[..., None, None]

    _, ends = jax.lax.associative_scan(_in_turn, (keeps, adds), axis=1)
    starts = jnp.pad(ends[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])
    return y + product("bkqhn,bkhpn->bkqhp", of_heads(read), starts) * jnp.exp(total)[..., None]


def grouped_scan(
    u: jax.Array, step: jax.Array, rate: jax.Array, write: jax.Array, read: jax.Array, *, chunk: int | None = None
) -> jax.Array:
    """Mamba-2's recurrence (arXiv 2405.21060): a head of P channels has a state of P x N numbers and one decay.

        h_t = exp(-step_t rate) h_{t-1} + step_t u_t write_t^T,    y_t = h_t read_t

    Computed by matrix products (section 6): within a chunk as attention, between chunks by the states, all chunks at
    once. The backward pass keeps the inputs alone.

    Args:
        u: (B, L, heads, P). Its dtype is that of the factors of matrix products; sums and decays are float32 (float64
            where u is).
        step: (B, L, heads), at least 0.
        rate: (heads,), above 0.
        write, read: (B, L, groups, N), where groups divides heads: head h uses group h // (heads / groups).
        chunk: tokens of a chunk; None: `GROUPED_CHUNK`. It changes the result by rounding only.

    Returns:
        y, (B, L, heads, P) float32; float64 where u is.
    """
    dtype, length = state_dtype(u), u.shape[1]
    chunk = min(GROUPED_CHUNK if chunk is None else chunk, length)
    u, step, write, read = (_chunks(array, 1, chunk) for array in (u, step.astype(dtype), write, read))
    y = _grouped(u, step, rate.astype(dtype), write, read)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]
