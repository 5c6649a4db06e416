"""The GSPN module: maps from a low-rank proxy, and their propagation (GSPN, section 3)."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import VARIANTS, UpProjection, propagate, propagate_low_rank
from pallas_kernels.propagation import ALIGNMENTS
from pallas_kernels.up_projection import maps_of

# Where the kernels load by TMA, rows of channels are multiples of 16 bytes.
CHANNEL_MULTIPLE = 8

# Uniform in +-1 / sqrt(fan in), which is what the authors' program starts its convolutions with.
FAN_IN_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class GSPNMixer(nnx.Module):
    """Propagation of a map in four directions by weights made of the map itself, (B, H, W, C) to (B, H, W, C).

    A proxy of `proxy_rank` channels is a linear function of the map; the logits of the weights, lam, gate and skip are
    linear functions of the proxy. Nothing has a bias, and no position is embedded: the order of the scans tells it.
    Forward mode (`jax.jvp`, `jax.hessian`) is not supported, as in `pallas_kernels.propagate_low_rank`.
    """

    def __init__(
        self,
        features: int,
        *,
        proxy_rank: int = 8,
        weight_channels: int | None = None,
        propagation_channels: int | None = None,
        chunk: int | None = None,
        alignment: str = "aligned",
        implementation: str | None = None,
        variant: str | None = None,
        keep_states: bool = True,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        features: C.
        proxy_rank: channels of the proxy.
        weight_channels: channels of the weight maps, a divisor of the channels that propagate; 1 is GSPN-2's one
          affinity for all, None one each.
        propagation_channels: propagates that many channels, between two projections (GSPN-2's compact propagation);
          None propagates the map itself. The proxy is made of the whole map in either case.
        chunk: lines after which the scans restart (local GSPN); None: global, at every resolution.
        alignment: "aligned" or "unturned", as in `pallas_kernels.propagate`.
        implementation: of the propagation; None takes the fastest.
        variant: of the Mosaic kernels, as in `pallas_kernels.propagate_low_rank`; None for the fastest by their table.
        keep_states: keeps the hidden states of the four directions for the gradient, four maps in `dtype`; else the
          propagation runs again in the backward pass.
        dtype: of the computation; the hidden state is float32.
        """
        channels = features if propagation_channels is None else propagation_channels
        for name, value in (("features", features), ("proxy_rank", proxy_rank), ("propagation_channels", channels)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value}")
        weight_channels = channels if weight_channels is None else weight_channels
        if weight_channels < 1 or channels % weight_channels:
            raise ValueError(f"weight_channels: expected a divisor of {channels} channels, got {weight_channels}")
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment: expected one of {', '.join(ALIGNMENTS)}; got {alignment!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: expected None or at least 1 line, got {chunk}")
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"variant: expected None or one of {', '.join(VARIANTS)}; got {variant!r}")
        self.chunk, self.alignment, self.implementation, self.variant = chunk, alignment, implementation, variant
        self.keep_states, self.dtype = keep_states, dtype
        self.channels, self.weight_channels = channels, weight_channels

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                kernel_init=FAN_IN_UNIFORM,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.proxy = linear(features, proxy_rank)
        # Columns: (direction, slot, weight channel), and (direction, channel).
        self.logits = linear(proxy_rank, 12 * weight_channels)
        self.lam = linear(proxy_rank, 4 * channels)
        self.gate = linear(proxy_rank, 4 * channels)
        self.skip = linear(proxy_rank, 4 * channels)
        # The merge of the four directions is a 1x1 convolution from 4 maps to 1: fan in 4.
        self.merge = nnx.Param(jax.random.uniform(rngs.params(), (4,), param_dtype, -0.5, 0.5))
        compact = propagation_channels is not None
        self.reduce = linear(features, channels) if compact else None
        self.expand = linear(channels, features) if compact else None

    def __call__(self, x: jax.Array) -> jax.Array:
        features = self.proxy.in_features
        if x.ndim != 4 or x.shape[-1] != features:
            raise ValueError(f"x: expected shape (B, H, W, {features}), got {x.shape}")
        proxy = self.proxy(x)
        x = x.astype(self.dtype) if self.reduce is None else self.reduce(x)
        groups, size = _padded_channels(self.channels, self.weight_channels)
        pad_groups, pad_size = groups - self.weight_channels, size - self.channels // self.weight_channels

        def pad(array: jax.Array) -> jax.Array:
            """(..., channels) with zeros up to the channels that propagate."""
            if pad_groups == pad_size == 0:
                return array
            array = array.reshape(*array.shape[:-1], self.weight_channels, -1)
            array = jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, pad_groups), (0, pad_size)])
            return array.reshape(*array.shape[:-2], groups * size)

        def columns(projection: nnx.Linear) -> jax.Array:
            # Zero columns are added to the projection, not to its result.
            return pad(projection.kernel[...].astype(self.dtype).reshape(-1, 4, self.channels))

        logits = self.logits.kernel[...].astype(self.dtype).reshape(-1, 4, 3, self.weight_channels)
        logits = jnp.pad(logits, [(0, 0)] * 3 + [(0, pad_groups)])
        up = UpProjection(logits, *(columns(projection) for projection in (self.lam, self.gate, self.skip)))
        options: Any = dict(chunk=self.chunk, implementation=self.implementation, variant=self.variant)

        def propagation(x: jax.Array, proxy: jax.Array, up: UpProjection, merge: jax.Array) -> jax.Array:
            if self.alignment == "aligned":
                return propagate_low_rank(x, proxy, up, merge, **options)
            return propagate(x, *maps_of(proxy, up), merge, alignment=self.alignment, **options)

        propagation = propagation if self.keep_states else jax.checkpoint(propagation)
        y = self._unpad(propagation(pad(x), proxy, up, self.merge[...]), groups, size)
        return y if self.expand is None else self.expand(y)

    def _unpad(self, y: jax.Array, groups: int, size: int) -> jax.Array:
        y = y.reshape(*y.shape[:-1], groups, size)
        y = y[..., : self.weight_channels, : self.channels // self.weight_channels]
        return y.reshape(*y.shape[:-2], self.channels)


def _padded_channels(channels: int, weight_channels: int) -> tuple[int, int]:
    """The least (weight channels, channels that share each) of at least the given ones, in all a multiple of 8.

    Channel c uses weight channel c // size: either more groups are added at the end, or each group grows.
    """
    size = channels // weight_channels

    def grown(start: int, factor: int) -> int:
        return next(n for n in range(start, start + CHANNEL_MULTIPLE) if n * factor % CHANNEL_MULTIPLE == 0)

    return min(
        (grown(weight_channels, size), size), (weight_channels, grown(size, weight_channels)), key=lambda p: p[0] * p[1]
    )
