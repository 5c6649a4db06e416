"""Mamba-2 (arXiv 2405.21060) on maps, read row by row: a baseline."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers.arguments import check_counts, check_map
from gspn_jax.mixers.gspn import FAN_IN_UNIFORM
from gspn_jax.mixers.mamba import EPSILON, CausalConv, check_expansion, check_form, step_bias_init
from gspn_jax.mixers.state_space import added, both_ways, grouped_scan
from pallas_kernels.checks import state_dtype

HEAD_WIDTH = 64


class GatedNorm(nnx.Module):
    """Norm of y silu(z) by its root mean square over each group of channels, (B, L, C) to (B, L, C)."""

    def __init__(self, features: int, groups: int, *, epsilon: float = 1e-5, param_dtype: jnp.dtype):
        self.groups, self.epsilon = groups, epsilon
        self.scale = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """Returns (B, L, C) in the dtype of y, which is float32 or wider."""
        y = y * jax.nn.silu(z.astype(y.dtype))
        # (B, L, C) to (B, L, groups, C / groups)
        grouped = y.reshape(*y.shape[:2], self.groups, -1)
        square = jnp.mean(grouped * grouped, axis=-1, keepdims=True)
        y = (grouped * jax.lax.rsqrt(square + self.epsilon)).reshape(y.shape)
        return y * self.scale[...].astype(y.dtype)[None, None]


class Mamba2Mixer(nnx.Module):
    """Mamba-2 over the H W pixels of a map in row-major order, (B, H, W, C) to (B, H, W, C). For a sequence x:

        [z, (u, B, C), s] = widen(x),   (u, B, C) = silu(conv(u, B, C)),   step = softplus(s + step_bias)
        y = grouped_scan(u, step, exp(log_rate), B, C) + skip u
        result = narrow(norm(y silu(z)))

    `bidirectional` adds the result for the reversed sequence, turned back; both directions share the parameters.

    No paper gives the sizes of the Mambas in place of self-attention: the defaults are those of the program that the
    authors of Mamba-2 released.
    """

    def __init__(
        self,
        features: int,
        *,
        state: int = 128,
        conv: int = 4,
        expand: float = 2,
        head_dim: int | None = None,
        groups: int = 1,
        form: str = "full",
        bidirectional: bool = True,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the layers.

        Args:
            features: C, the channels of the map.
            state: N; a channel's state has N numbers.
            conv: taps of the convolution.
            expand: channels of the recurrence divided by C.
            head_dim: channels of a head, which share one decay; a divisor of expand * C. None: the largest up to 64.
            groups: of heads, which share B and C; a divisor of the number of heads.
            form: as in `MambaMixer`; "plain" leaves out the norm as well.
            bidirectional: scans in both directions.
            dtype: dtype of the computation; decays, sums and the norm are float32 (float64 if it is float64).
            param_dtype: dtype of the parameters.
            rngs: source of the initial parameters.

        Raises:
            ValueError: an argument out of range; the message names it.
        """
        check_counts(features=features, state=state, conv=conv, groups=groups)
        inner = check_expansion(features, expand)
        check_form(form)
        if head_dim is None:
            head_dim = next(n for n in range(min(HEAD_WIDTH, inner), 0, -1) if inner % n == 0)
        if head_dim < 1 or inner % head_dim:
            raise ValueError(f"head_dim: expected a divisor of expand * features = {inner}, got {head_dim}")
        heads = inner // head_dim
        if heads % groups:
            raise ValueError(f"groups: expected a divisor of {heads} heads, got {groups}")
        self.form, self.bidirectional, self.dtype = form, bidirectional, dtype
        self.inner, self.heads, self.groups, self.state = inner, heads, groups, state
        options: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, kernel_init=FAN_IN_UNIFORM, **options)
        is_full, convolved = form == "full", inner + 2 * groups * state
        self.widen = linear(features, (inner if is_full else 0) + convolved + heads)
        self.conv = CausalConv(convolved, conv, **options) if is_full else None
        self.step_bias = nnx.Param(step_bias_init(rngs.params(), (heads,), param_dtype))
        rates = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1, 16)
        self.log_rate = nnx.Param(jnp.log(rates).astype(param_dtype))
        self.skip = nnx.Param(jnp.ones(heads, param_dtype))
        self.norm = GatedNorm(inner, groups, param_dtype=param_dtype) if is_full else None
        self.narrow = linear(inner, features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, H, W, C) in the dtype of the computation, for x (B, H, W, C); ValueError for another shape."""
        check_map(x, self.widen.in_features)
        projected = self.widen(x.reshape(x.shape[0], -1, x.shape[-1]))  # (B, L, channels of all parts)
        projected = both_ways(projected) if self.bidirectional else projected
        merged = added if self.bidirectional else lambda tokens: tokens
        ends = [-self.heads - self.inner - 2 * self.groups * self.state, -self.heads]
        z, mixed, step = jnp.split(projected, [projected.shape[-1] + end for end in ends], axis=-1)
        mixed = jax.nn.silu(mixed if self.conv is None else self.conv(mixed))
        u, write, read = self._split(mixed)
        wide, ones = state_dtype(x), jnp.ones_like(u[..., :1])
        step = jax.nn.softplus(step.astype(wide) + self.step_bias[...].astype(wide)[None, None])
        rate = jnp.exp(self.log_rate[...].astype(wide))
        if self.form == "normalised":
            # The result for u = 1 is that of one more channel a head.
            y = merged(grouped_scan(jnp.concatenate([u, ones], axis=-1), step, rate, write, read))
            y = y[..., :-1] / (y[..., -1:] + EPSILON)
            u = merged(u)
        else:
            y = grouped_scan(u, step, rate, write, read)
        y += self.skip[...].astype(wide)[None, None, :, None] * u.astype(wide)
        y = y.reshape(*y.shape[:2], self.inner)
        y = y if self.norm is None else self.norm(y, z)
        y = y if self.form == "normalised" else merged(y)
        return self.narrow(y.astype(self.dtype)).reshape(x.shape)

    def _split(self, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns u (B, L, heads, P), B and C, each (B, L, groups, N)."""
        states = self.groups * self.state
        u, write, read = jnp.split(mixed, [self.inner, self.inner + states], axis=-1)
        write, read = (array.reshape(*array.shape[:2], self.groups, -1) for array in (write, read))
        return u.reshape(*u.shape[:2], self.heads, -1), write, read
