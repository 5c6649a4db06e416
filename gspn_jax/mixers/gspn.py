"""The GSPN module (GSPN, section 3): four line scans whose weights are predicted from the map."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers.arguments import check_counts, check_map
from gspn_jax.mixers.unturned import propagate_turned, wide_logits, wide_turns
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
    With `query_key_value`, linear functions of the map are added to what lam, gate and the scans are computed from: by
    the correspondence with linear attention, lam follows the keys, gate the queries and the scanned map the values.
    Forward mode (`jax.jvp`, `jax.hessian`) is not supported, as in `pallas_kernels.propagate_low_rank`.
    """

    def __init__(
        self,
        features: int,
        *,
        proxy_rank: int = 8,
        weight_channels: int | None = None,
        propagation_channels: int | None = None,
        query_key_value: bool = False,
        out_projection: bool = False,
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
            query_key_value: computes lam from proxy(x + key(x)) and gate from proxy(x + query(x)), and propagates
                x + value(x); query, key and value are linear and have C channels. False: proxy(x) and x.
            out_projection: ends with a linear layer with bias, as attention does. With this and `query_key_value` a
                module is what GSPN's text-to-image networks have in place of self-attention.
            chunk: lines after which the scans restart (local GSPN); None: global, at every resolution.
            alignment: "aligned" or "unturned", as in `pallas_kernels.propagate`. With `out_projection`, "unturned" also
                takes maps with W = 2 H, in the way of the released text-to-image program (`wide_turns`).
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
        check_counts(features=features, proxy_rank=proxy_rank, propagation_channels=channels)
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

        def linear(inputs: int, outputs: int, use_bias: bool = False) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=use_bias,
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
        self.query, self.key, self.value = (linear(features, features) if query_key_value else None for _ in range(3))
        self.out = linear(features, features, use_bias=True) if out_projection else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, H, W, C) in the dtype of the computation, for x (B, H, W, C); ValueError for another shape."""
        check_map(x, self.proxy.in_features)
        propagation = self._propagation if self.keep_states else jax.checkpoint(self._propagation)
        y = self._unpad(propagation(self._propagated(x), self._proxy(x), self._up_projection(), self.merge[...]))
        y = y if self.expand is None else self.expand(y)
        return y if self.out is None else self.out(y)

    def _propagation(self, x: jax.Array, proxy: jax.Array, up: UpProjection, merge: jax.Array) -> jax.Array:
        """Returns x propagated, with zero channels added."""
        options: Any = dict(chunk=self.chunk, implementation=self.implementation)
        if self.alignment == "aligned":
            return propagate_low_rank(self._pad(x), proxy, up, merge, variant=self.variant, **options)
        if self.out is None or x.shape[1] == x.shape[2]:
            options |= dict(alignment="unturned", variant=self.variant)
            return propagate(self._pad(x), *maps_of(proxy, up), merge, **options)
        if x.shape[2] != 2 * x.shape[1]:
            raise ValueError(f"x: expected H = W, or W = 2 H, for alignment 'unturned'; got shape {x.shape}")
        maps = maps_of(proxy, up._replace(logits=wide_logits(up.logits)))
        return propagate_turned([self._pad(turn) for turn in wide_turns(x)], *maps, merge, **options)

    def _proxy(self, x: jax.Array) -> jax.Array:
        """Returns the proxy, (B, H, W, S): of x, or those of x, x + key(x) and x + query(x) side by side."""
        if self.key is None or self.query is None:
            return self.proxy(x)
        x = x.astype(self.dtype)
        return jnp.concatenate([self.proxy(one) for one in (x, x + self.key(x), x + self.query(x))], axis=-1)

    def _propagated(self, x: jax.Array) -> jax.Array:
        """Returns the map that propagates, (B, H, W, channels)."""
        x = x.astype(self.dtype)
        x = x if self.value is None else x + self.value(x)
        return x if self.reduce is None else self.reduce(x)

    def _up_projection(self) -> UpProjection:
        """Returns the projections of `_proxy` to all maps, padded."""

        def columns(layer: nnx.Linear, *slots: int) -> jax.Array:
            """Returns (S, 4, *slots, channels): the kernel is padded instead of the maps."""
            kernel = layer.kernel[...].astype(self.dtype)
            if slots:
                kernel = kernel.reshape(-1, 4, *slots, self.weight_channels)
                return jnp.pad(kernel, [(0, 0)] * 3 + [(0, self._padding[0])])
            return self._pad(kernel.reshape(-1, 4, self.channels))

        logits, *others = columns(self.logits, 3), *map(columns, (self.lam, self.gate, self.skip))
        if self.key is None:
            return UpProjection(logits, *others)
        # Each map takes one of the three proxies: zeros in the rows of the other two keep it a product with all three.
        rank = self.proxy.out_features

        def rows(array: jax.Array, index: int) -> jax.Array:
            return jnp.pad(array, [(index * rank, (2 - index) * rank)] + [(0, 0)] * (array.ndim - 1))

        return UpProjection(*(rows(array, index) for array, index in zip((logits, *others), (0, 1, 2, 0), strict=True)))

    @property
    def _padding(self) -> tuple[int, int]:
        """Weight channels, and channels per weight channel, that are added."""
        groups, size = _padded_channels(self.channels, self.weight_channels)
        return groups - self.weight_channels, size - self.channels // self.weight_channels

    def _pad(self, array: jax.Array) -> jax.Array:
        """Returns (..., channels) with zero channels added."""
        if self._padding == (0, 0):
            return array
        array = array.reshape(*array.shape[:-1], self.weight_channels, -1)
        array = jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, added) for added in self._padding])
        return array.reshape(*array.shape[:-2], -1)

    def _unpad(self, y: jax.Array) -> jax.Array:
        """Returns (..., channels): y without the added zero channels."""
        y = y.reshape(*y.shape[:-1], self.weight_channels + self._padding[0], -1)
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
