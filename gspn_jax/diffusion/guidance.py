"""Classifier-free guidance (arXiv 2207.12598) of a conditional denoiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ConditionalDenoiser = Callable[[jax.Array, jax.Array, Any], jax.Array]


def guided(
    denoiser: ConditionalDenoiser,
    condition: Any,
    *,
    scale: float | jax.Array = 1.0,
    no_class: Any,
    interval: tuple[float, float] | None = None,
    channels: int | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a denoiser (x_t, time) that predicts unconditional + scale (conditional - unconditional).

    `scale` is 1 + w in equation 6 of arXiv 2207.12598.

    Args:
        denoiser: called as denoiser(x_t (B, ..., C), time (B,), condition).
        condition: the samples' condition: labels (B,), or any tree of arrays (B, ...).
        scale: strength of guidance. A Python number 1 gives the conditional prediction and calls the denoiser without
            doubling the batch.
        no_class: the condition of the unconditional prediction: a tree like `condition`, whose leaves broadcast to its
            leaves; for labels an integer.
        interval: first and last time, in the denoiser's units, at which guidance acts (arXiv 2404.07724). At other
            times the result is the conditional prediction. None: guidance always acts.
        channels: guides the first `channels` channels; DiT's program guides 3. None guides all C. Variance channels
            are never guided.

    Raises:
        ValueError: the interval is reversed.
    """
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval: expected a smaller and a larger time, got {interval}")
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, time: denoiser(x, time, condition)

    def guided_denoiser(x: jax.Array, time: jax.Array) -> jax.Array:
        both = jax.tree.map(
            lambda leaf, none: jnp.concatenate([leaf, jnp.broadcast_to(jnp.asarray(none, leaf.dtype), leaf.shape)]),
            condition, no_class,
        )  # fmt: skip
        output = denoiser(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both)  # (2 B, ..., C or 2 C)
        conditional, unconditional = jnp.split(output, 2)
        count = x.shape[-1] if channels is None else channels
        acts = jnp.full(time.shape, True) if interval is None else (interval[0] <= time) & (time <= interval[1])
        strength = jnp.where(acts, scale, 1).astype(output.dtype).reshape(-1, *[1] * (output.ndim - 1))
        mixed = unconditional + strength * (conditional - unconditional)
        return jnp.concatenate([mixed[..., :count], conditional[..., count:]], axis=-1)

    return guided_denoiser
