"""The state of a training run: one pytree, donated to every step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Parameters = Any  # nested dict with string keys and array leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: () int32, the number of optimiser steps so far.
        params: nested dict of arrays.
        ema: the moving average of `params`, or None.
        opt_state: the state of the optimiser, such as Adam's moments.
    """

    step: jax.Array
    params: Parameters
    ema: Parameters | None
    opt_state: optax.OptState


def initial_state(
    initialise: Callable[[jax.Array], Parameters],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    keep_ema: bool,
) -> TrainState:
    """Returns the state at step 0. Traceable.

    Args:
        initialise: PRNG key -> parameters.
        optimizer: the optimiser.
        seed: seed of the PRNG key.
        keep_ema: whether the state has a moving average; it starts as a copy of the parameters.
    """
    params = initialise(jax.random.key(seed))
    ema = jax.tree.map(jnp.copy, params) if keep_ema else None
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, ema=ema, opt_state=optimizer.init(params))


def parameter_count(params: Parameters) -> int:
    """Returns the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
