"""Classifier-free guidance (arXiv 2207.12598) of a class-conditional denoiser."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

ConditionalDenoiser = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def guided(
    denoiser: ConditionalDenoiser,
    labels: jax.Array,
    *,
    scale: float = 1.0,
    no_class: int,
    interval: tuple[float, float] | None = None,
    channels: int | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The denoiser of (x_t, time) for these classes: unguided + scale (conditional - unguided).

    Args:
      denoiser: of (x_t (B, ..., C), time (B,), labels (B,)).
      labels: (B,) int.
      scale: 1 for the conditional prediction alone, which then costs one call of half the batch.
      no_class: the label of the unconditional prediction.
      interval: times, as the denoiser is told them, between which guidance acts (arXiv 2404.07724); elsewhere the
        conditional prediction is taken. None: always.
      channels: the first channels of the prediction that are guided, the rest being the conditional ones: 3 is what
        DiT's program does. None: as many as x_t has; what is said of a variance is never guided.
    """
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval: expected a smaller and a larger time, got {interval}")
    if scale == 1:
        return lambda x, time: denoiser(x, time, labels)

    def of_both(x: jax.Array, time: jax.Array) -> jax.Array:
        both = jnp.concatenate([labels, jnp.full_like(labels, no_class)])
        output = denoiser(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both)
        conditional, unconditional = jnp.split(output, 2)
        count = x.shape[-1] if channels is None else channels
        acts = jnp.full(time.shape, True) if interval is None else (interval[0] <= time) & (time <= interval[1])
        strength = jnp.where(acts, scale, 1).astype(output.dtype).reshape(-1, *[1] * (output.ndim - 1))
        mixed = unconditional + strength * (conditional - unconditional)
        return jnp.concatenate([mixed[..., :count], conditional[..., count:]], axis=-1)

    return of_both
