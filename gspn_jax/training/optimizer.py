"""AdamW with a schedule, a decay mask, clipping and a moving average of the parameters."""

import dataclasses
import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gspn_jax.training.state import Parameters

REFERENCE_BATCH = 512  # images per step to which the learning rates of the options refer


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Options of the optimiser. Learning rates are those of a batch of 512 and are scaled with the batch.

    Attributes:
        learning_rate: the highest rate, at the end of the warm-up.
        warmup_learning_rate: rate of the first step.
        min_learning_rate: rate at the end of the cosine.
        warmup_steps: optimiser steps of linear warm-up, before the cosine.
        weight_decay: decoupled weight decay; only matrices and kernels decay, see `decays`.
        b1: decay of Adam's mean of gradients, in [0, 1).
        b2: decay of Adam's mean of squared gradients, in [0, 1).
        eps: added to Adam's denominator, > 0.
        clip: bound on the global norm of the gradients; 0 turns it off.
        ema_decay: decay of the moving average of the parameters, in [0, 1); 0: no moving average.
        ema_warmup: use min(ema_decay, (1 + step) / (10 + step)), so that short runs forget their start.

    Raises:
        ValueError: an option is out of its range or not finite.
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
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps: expected a finite number > 0, got {self.eps}")
        if not isinstance(self.warmup_steps, numbers.Integral) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected an integer >= 0, got {self.warmup_steps}")


def learning_rate_schedule(
    options: OptimizerOptions, *, num_steps: int, batch_size: int
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Returns step -> () learning rate: linear warm-up, then a cosine over the other steps.

    Args:
        options: rates for a batch of 512.
        num_steps: optimiser steps of the whole run, including the warm-up.
        batch_size: global images per optimiser step, including accumulation.

    Raises:
        ValueError: the warm-up takes all steps.
    """
    if num_steps < 1 or options.warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_steps: expected fewer than the {num_steps} steps of the run, got {options.warmup_steps}"
        )
    scale = batch_size / REFERENCE_BATCH
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=options.warmup_learning_rate * scale,
        peak_value=options.learning_rate * scale,
        warmup_steps=options.warmup_steps,
        decay_steps=num_steps,
        end_value=options.min_learning_rate * scale,
    )
    # optax computes in the type of the step, and strict promotion forbids to mix its integers with floats.
    return lambda step: jnp.asarray(schedule(jnp.asarray(step, float)))


def decays(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Returns whether weight decay applies: to leaves that have at least two axes longer than 1.

    Biases, norms and per-channel scales are vectors, some with extra axes of length 1.
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
