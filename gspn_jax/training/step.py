"""One optimiser step as a compiled program: gradients, accumulation, clipping, update, moving average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gspn_jax.training.optimizer import OptimizerOptions, learning_rate_schedule, update_ema
from gspn_jax.training.options import TrainOptions
from gspn_jax.training.sharding import batch_sharding
from gspn_jax.training.state import Parameters, TrainState

Loss = Callable[[Parameters, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_step(
    loss: Loss,
    transform: optax.GradientTransformation,
    optimizer: OptimizerOptions,
    options: TrainOptions,
    shardings: TrainState,
    mesh: Mesh,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the compiled step: (state, batch) -> (state, numbers). The state is donated.

    The PRNG key of a part of a batch is fold_in(fold_in(seed, step), part), so that a resumed run draws the same
    numbers as an uninterrupted one.

    Args:
        loss: (params, batch, key) -> (() loss, dict of () numbers).
        transform: the optimiser.
        optimizer: options of the optimiser (schedule and moving average).
        options: options of the run (steps, batch size, seed, accumulation).
        shardings: a NamedSharding for each leaf of the state.
        mesh: a mesh with the axis `data`.
    """
    schedule = learning_rate_schedule(optimizer, num_steps=options.num_steps, batch_size=options.batch_size)

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(options.seed), state.step)
        grads, numbers = accumulated(loss, state.params, batch, key, options.accumulate, mesh)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else update_ema(state.ema, params, state.step, optimizer)
        numbers |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), numbers

    everywhere = NamedSharding(mesh, P())
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def accumulated(
    loss: Loss, params: Parameters, batch: dict[str, jax.Array], key: jax.Array, parts: int, mesh: Mesh
) -> tuple[Parameters, dict[str, jax.Array]]:
    """Returns gradients and numbers, averaged over `parts` interleaved parts of the batch, one part after the other."""

    def gradients(rows: dict[str, jax.Array], part: Any) -> tuple[Parameters, dict[str, jax.Array]]:
        (value, numbers), grads = jax.value_and_grad(loss, has_aux=True)(params, rows, jax.random.fold_in(key, part))
        return grads, {"loss": value} | numbers

    if parts == 1:
        return gradients(batch, 0)

    def cut(rows: jax.Array) -> jax.Array:
        # Part i takes rows i, i + parts, ..., so that each device uses its own rows and none are sent.
        rows = jnp.moveaxis(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, P(None, "data")))

    def add(total: Any, inputs: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(*inputs)), None

    pieces = jax.tree.map(cut, batch)
    first = jax.tree.map(lambda rows: rows[0], pieces)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradients, first, 0))
    total, _ = jax.lax.scan(add, zeros, (pieces, jnp.arange(parts)))
    return jax.tree.map(lambda leaf: leaf / parts, total)
