"""AdamW as the classifiers use it: schedule, decay mask, clipping, moving average."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gspn_jax.training.state import Parameters

REFERENCE_BATCH = 512  # the learning rates are given for this many images a step


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """What the optimiser needs to know. Learning rates are those of a batch of 512 and are scaled with the batch.

    Attributes:
        learning_rate: peak, reached after the warm-up.
        warmup_learning_rate: of the first step.
        min_learning_rate: at the end of the cosine and from then on.
        warmup_steps: optimiser steps of linear warm-up; they do not count into the cosine.
        weight_decay: decoupled; only matrices and kernels decay, see `decays`.
        clip: bound on the global norm of the gradients; 0 turns it off.
        ema_decay: of the moving average of the parameters; 0 keeps none.
        ema_warmup: use min(ema_decay, (1 + step) / (10 + step)), so that short runs forget their start.
    """

    learning_rate: float = 5e-4
    warmup_learning_rate: float = 5e-7
    min_learning_rate: float = 5e-6
    warmup_steps: int = 0
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 5.0
    ema_decay: float = 0.9999
    ema_warmup: bool = False

    def __post_init__(self):
        for name in ("learning_rate", "warmup_learning_rate", "min_learning_rate", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected an integer >= 0, got {self.warmup_steps}")


def learning_rate_schedule(
    options: OptimizerOptions, *, num_steps: int, batch_size: int
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Returns step -> learning rate: linear warm-up, then a cosine over the steps that are left.

    Args:
        options: rates for a batch of 512.
        num_steps: optimiser steps of the whole run, the warm-up included.
        batch_size: global images per optimiser step (accumulation included).

    Raises:
        ValueError: the warm-up leaves no step.
    """
    if num_steps < 1 or options.warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_steps: expected fewer than the {num_steps} steps of the run, got {options.warmup_steps}"
        )
    scale = batch_size / REFERENCE_BATCH
    peak, first, last = (
        rate * scale for rate in (options.learning_rate, options.warmup_learning_rate, options.min_learning_rate)
    )
    cosine_steps = num_steps - options.warmup_steps

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warming = first + (peak - first) * step / max(options.warmup_steps, 1)
        progress = jnp.clip((step - options.warmup_steps) / cosine_steps, 0.0, 1.0)
        cooling = last + 0.5 * (peak - last) * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < options.warmup_steps, warming, cooling)

    return schedule


def decays(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether weight decay applies: to leaves with two axes or more that are longer than 1.

    Biases, norms and per-channel scales are vectors, whatever singleton axes they carry.
    """
    return sum(length > 1 for length in leaf.shape) >= 2


def make_optimizer(options: OptimizerOptions, *, num_steps: int, batch_size: int) -> optax.GradientTransformation:
    """Returns clipping, Adam, decoupled decay and the schedule as one transformation. Moments are float32."""
    schedule = learning_rate_schedule(options, num_steps=num_steps, batch_size=batch_size)
    steps = [optax.clip_by_global_norm(options.clip)] if options.clip else []
    steps += [
        optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps),
        optax.add_decayed_weights(options.weight_decay, mask=lambda params: jax.tree.map(decays, params)),
        optax.scale_by_learning_rate(schedule),
    ]
    chain = optax.chain(*steps)

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        # Adam's bias correction raises a float to an integer count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def update_ema(ema: Parameters, params: Parameters, step: jax.Array, options: OptimizerOptions) -> Parameters:
    """Returns the moving average after `params`, the parameters of optimiser step number `step` (from 0)."""
    decay: float | jax.Array = options.ema_decay
    if options.ema_warmup:
        count = step.astype(jnp.float32)
        decay = jnp.minimum(options.ema_decay, (1.0 + count) / (10.0 + count))
    return optax.incremental_update(params, ema, 1.0 - decay)
