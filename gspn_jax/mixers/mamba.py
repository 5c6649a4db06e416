"""Mamba (arXiv 2312.00752) on maps, read row by row: a baseline."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers.arguments import check_counts, check_map
from gspn_jax.mixers.gspn import FAN_IN_UNIFORM
from gspn_jax.mixers.state_space import added, both_ways, causal_conv, selective_scan
from pallas_kernels.checks import state_dtype

FORMS = ("full", "plain", "normalised")
# Added to the sum that a result is divided by, as in `LinFusionAttention`.
EPSILON = 1e-4


class CausalConv(nnx.Module):
    """Depthwise convolution of sequences that sees no later token, (B, L, C) to (B, L, C), with bias."""

    def __init__(self, features: int, taps: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialises kernel (taps, C) and bias (C,), uniform in +-1 / sqrt(taps)."""
        self.dtype, bound = dtype, taps**-0.5
        draw = functools.partial(jax.random.uniform, dtype=param_dtype, minval=-bound, maxval=bound)
        self.kernel = nnx.Param(draw(rngs.params(), (taps, features)))
        self.bias = nnx.Param(draw(rngs.params(), (features,)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return causal_conv(*(array.astype(self.dtype) for array in (tokens, self.kernel[...], self.bias[...])))


class MambaMixer(nnx.Module):
    """Mamba over the H W pixels of a map in row-major order, (B, H, W, C) to (B, H, W, C). For a sequence of tokens x:

        [u, z] = widen(x),   u = silu(conv(u)),   [s, B, C] = select(u),   step = softplus(step(s))
        y = selective_scan(u, step, exp(log_rate), B, C) + skip u
        result = narrow(y silu(z))

    `bidirectional` adds the result for the reversed sequence, turned back; both directions share the parameters.

    No paper gives the sizes of the Mambas in place of self-attention: the defaults are those of the program that the
    authors of Mamba released.
    """

    def __init__(
        self,
        features: int,
        *,
        state: int = 16,
        conv: int = 4,
        expand: float = 2,
        rank: int | None = None,
        form: str = "full",
        bidirectional: bool = True,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the layers.

        Args:
            features: C, the channels of the map.
            state: numbers in the state of a channel.
            conv: taps of the convolution.
            expand: channels of the recurrence divided by C.
            rank: channels from which the steps are computed; None: C / 16, rounded up.
            form: "full"; "plain" leaves out convolution and gate; "normalised" moreover divides the recurrence's result
                by that for u = 1, so that it is a weighted mean of tokens. As B and C may be negative, so may be the
                weights, and their sum may come near zero.
            bidirectional: scans in both directions.
            dtype: dtype of the computation; the recurrence is float32 (float64 if it is float64).
            param_dtype: dtype of the parameters.
            rngs: source of the initial parameters.

        Raises:
            ValueError: an argument out of range; the message names it.
        """
        rank = math.ceil(features / 16) if rank is None else rank
        check_counts(features=features, state=state, conv=conv, rank=rank)
        inner = check_expansion(features, expand)
        check_form(form)
        self.form, self.bidirectional, self.dtype = form, bidirectional, dtype
        options: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, kernel_init=FAN_IN_UNIFORM, **options)
        is_full = form == "full"
        self.widen = linear(features, 2 * inner if is_full else inner)
        self.conv = CausalConv(inner, conv, **options) if is_full else None
        self.select = linear(inner, rank + 2 * state)
        self.step = linear(rank, inner, use_bias=True, bias_init=step_bias_init)
        # (inner, state): every channel has the rates 1 to N
        rates = jnp.log(jnp.arange(1, state + 1, dtype=param_dtype))
        self.log_rate = nnx.Param(jnp.tile(rates, (inner, 1)))
        self.skip = nnx.Param(jnp.ones(inner, param_dtype))
        self.narrow = linear(inner, features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, H, W, C) in the dtype of the computation, for x (B, H, W, C); ValueError for another shape."""
        check_map(x, self.widen.in_features)
        # (B, H, W, C) to (B, L, inner), and the gate likewise
        u, *gate = jnp.split(self.widen(x.reshape(x.shape[0], -1, x.shape[-1])), 1 if self.conv is None else 2, axis=-1)
        u = both_ways(u) if self.bidirectional else u
        u = jax.nn.silu(u if self.conv is None else self.conv(u))
        wide, rank = state_dtype(u), self.step.in_features
        step, write, read = jnp.split(self.select(u), [rank, (rank + self.select.out_features) // 2], axis=-1)
        step = jax.nn.softplus(self.step(step).astype(wide))
        rate = jnp.exp(self.log_rate[...].astype(wide))
        merged = added if self.bidirectional else lambda tokens: tokens
        y = merged(selective_scan(u, step, rate, write, read))
        if self.form == "normalised":
            y /= merged(selective_scan(jnp.ones_like(u), step, rate, write, read)) + EPSILON
        y += self.skip[...].astype(wide)[None, None] * merged(u.astype(wide))
        for z in gate:
            y *= jax.nn.silu(z.astype(wide))
        return self.narrow(y.astype(self.dtype)).reshape(x.shape)


def step_bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Any, **unused: Any) -> jax.Array:
    """Returns biases whose softplus is between 0.001 and 0.1, uniform in its logarithm."""
    step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(0.1)))
    return jnp.log(jnp.expm1(step)).astype(dtype)


def check_expansion(features: int, expand: float) -> int:
    """Returns the channels of the recurrence; ValueError unless there is at least one."""
    if not 0.5 <= expand * features < math.inf:
        raise ValueError(f"expand: expected a number above 0, got {expand}")
    return round(expand * features)


def check_form(form: str) -> None:
    """Raises ValueError unless `FORMS` has the name."""
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}; got {form!r}")
