"""The GSPN module (GSPN, section 3): four line scans whose weights are predicted from the map."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import VARIANTS, UpProjection, propagate, propagate_low_rank
from pallas_kernels.propagation import ALIGNMENTS
from pallas_kernels.up_projection import maps_of

# TMA loads need rows of channels whose length is a multiple of 16 bytes.
CHANNEL_MULTIPLE = 8

# Uniform in +-1 / sqrt(fan in), the initialisation of convolutions in the authors' program.
FAN_IN_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class GSPNMixer(nnx.Module):
    """Propagates a map in four directions by weights that it predicts from the map, (B, H, W, C) to (B, H, W, C).

    A proxy of `proxy_rank` channels is a linear function of the map. The logits of the weights, lam, gate and skip are
    linear functions of the proxy. There are no biases and no positional embedding: the scans' order encodes positions.
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
        """Initialises the projections.

        Args:
            features: C, the channels of the map.
            proxy_rank: channels of the proxy.
            weight_channels: channels of the weight maps, a divisor of the channels that propagate. 1 shares one
                affinity between all channels (GSPN-2); None gives each channel its own.
            propagation_channels: projects the map to this many channels, propagates them and projects back (GSPN-2's
                compact propagation). None propagates the C channels. The proxy is computed from the C channels in
                either case.
            chunk: lines after which the scans restart (local GSPN); None: global, at every resolution.
            alignment: "aligned" or "unturned", as in `pallas_kernels.propagate`.
            implementation: of the propagation, as in `pallas_kernels.propagate`; None takes the fastest available.
            variant: Mosaic kernel variant, as in `pallas_kernels.propagate_low_rank`; None takes the fastest by the
                measured table.
            keep_states: keeps the hidden states of the four directions for the gradient, four maps in `dtype`. False
                runs the propagation again in the backward pass.
            dtype: dtype of the computation; the hidden state is float32.
            param_dtype: dtype of the parameters.
            rngs: source of the initial parameters.

        Raises:
            ValueError: an argument out of range; the message names it.
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
        """Returns (B, H, W, C) in the dtype of the computation, for x (B, H, W, C); ValueError for another shape."""
        features = self.proxy.in_features
        if x.ndim != 4 or x.shape[-1] != features:
            raise ValueError(f"x: expected shape (B, H, W, {features}), got {x.shape}")
        proxy = self.proxy(x)  # (B, H, W, proxy_rank)
        x = x.astype(self.dtype) if self.reduce is None else self.reduce(x)  # (B, H, W, channels that propagate)
        groups, size = _padded_channels(self.channels, self.weight_channels)
        pad_groups, pad_size = groups - self.weight_channels, size - self.channels // self.weight_channels

        def pad(array: jax.Array) -> jax.Array:
            """Returns (..., groups * size): (..., channels) with zero channels added."""
            if pad_groups == pad_size == 0:
                return array
            array = array.reshape(*array.shape[:-1], self.weight_channels, -1)
            array = jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, pad_groups), (0, pad_size)])
            return array.reshape(*array.shape[:-2], groups * size)

        def columns(projection: nnx.Linear) -> jax.Array:
            # Pads the kernel instead of the maps: (rank, 4, channels) to (rank, 4, groups * size).
            return pad(projection.kernel[...].astype(self.dtype).reshape(-1, 4, self.channels))

        # (rank, direction, slot, weight channel)
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
        """Returns (..., channels): (..., groups * size) without the added zero channels."""
        y = y.reshape(*y.shape[:-1], groups, size)
        y = y[..., : self.weight_channels, : self.channels // self.weight_channels]
        return y.reshape(*y.shape[:-2], self.channels)


def _padded_channels(channels: int, weight_channels: int) -> tuple[int, int]:
    """Returns the smallest (weight channels, channels per weight channel) whose product is a multiple of 8.

    Channel c uses weight channel c // size, so padding either adds groups at the end or enlarges every group.
    """
    size = channels // weight_channels

    def grown(start: int, factor: int) -> int:
        """Returns the least n >= start for which n * factor is a multiple of 8."""
        return next(n for n in range(start, start + CHANNEL_MULTIPLE) if n * factor % CHANNEL_MULTIPLE == 0)

    return min(
        (grown(weight_channels, size), size), (weight_channels, grown(size, weight_channels)), key=lambda p: p[0] * p[1]
    )
