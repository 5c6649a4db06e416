"""Counts the kernels in the compiled train step of a GSPN module: none runs more often than necessary."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from gspn_jax.mixers import GSPNMixer
from pallas_kernels import UpProjection, propagate_low_rank, record_choices
from pallas_kernels.mosaic import compile_only

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(compile_only.missing()), reason=str(compile_only.missing())),
]


def kernels_of_a_step(remat: bool) -> dict[str, int]:
    """Returns the number of kernels by name in the compiled train step of one module with SGD."""
    graph, state = nnx.split(nnx.eval_shape(lambda: GSPNMixer(32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    optimizer = optax.sgd(0.1)

    def loss(state, x):
        mixer = nnx.merge(graph, state)
        run = jax.checkpoint(lambda x: mixer(x)) if remat else mixer
        return jnp.sum(run(x).astype(jnp.float32) ** 2)

    def step(state, moments, x):
        updates, moments = optimizer.update(jax.grad(loss)(state, x), moments)
        return optax.apply_updates(state, updates), moments

    x = jax.ShapeDtypeStruct((1, 8, 8, 32), jnp.bfloat16)
    # flax's layers need standard promotion: they mix float32 parameters with bfloat16 maps.
    with jax.numpy_dtype_promotion("standard"), record_choices() as choices:
        compilation = compile_only.compile_for_h200(step, state, jax.eval_shape(optimizer.init, state), x)
    assert {choice.implementation for choice in choices} == {"mosaic"}
    assert not any(kernel.spill_bytes for kernel in compilation.kernels)
    return compile_only.kernel_counts(compilation.compiled)


@pytest.mark.parametrize("remat,forward", [(False, 1), (True, 2)])
def test_kernels_of_a_train_step(remat, forward):
    """Expects one kernel for all directions forward and one backward; remat adds a forward kernel."""
    found = kernels_of_a_step(remat)
    assert found.pop("low_rank_backward") == 1
    assert list(found.values()) == [forward]


def test_maps_in_memory_are_not_kept_for_the_gradient():
    """Checks that four layers of variant "scans" hold at most the maps of one layer and their gradients."""
    shape, rank, layers = (8, 16, 16, 64), 16, 4
    array: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    up = UpProjection(array((layers, rank, 4, 3, 64)), *[array((layers, rank, 4, 64))] * 3)

    def loss(x, up):
        for k in range(layers):
            of_layer = jax.tree.map(lambda columns, k=k: columns[k], up)
            x = propagate_low_rank(x, x[..., :rank], of_layer, jnp.ones(4), implementation="mosaic", variant="scans")
        return jnp.sum(x.astype(jnp.float32) ** 2)

    compiled = compile_only.compile_for_h200(jax.grad(loss, argnums=(0, 1)), array(shape), up).compiled
    memory = compiled.memory_analysis()
    assert memory is not None
    maps = 24 * 2 * math.prod(shape)
    assert 2 * maps < memory.temp_size_in_bytes < 4 * maps  # it would be 6 times if all were kept
