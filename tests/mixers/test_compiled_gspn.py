"""How often each kernel is in the compiled train step of a GSPN module, so that nothing runs twice unseen."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from experiments import deviceless
from gspn_jax.mixers import GSPNMixer
from pallas_kernels import record_choices

pytestmark = pytest.mark.skipif(bool(deviceless.missing()), reason=str(deviceless.missing()))


def kernels_of_a_step(remat: bool) -> dict[str, int]:
    """Of one module and SGD: by name, in the compiled program."""
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
    # flax's layers mix float32 parameters with bfloat16 maps by the usual promotion.
    with jax.numpy_dtype_promotion("standard"), record_choices() as choices:
        compilation = deviceless.compile_for_h200(step, state, jax.eval_shape(optimizer.init, state), x)
    assert {choice.implementation for choice in choices} == {"mosaic"}
    assert not any(kernel.spill_bytes for kernel in compilation.kernels)
    return deviceless.kernel_counts(compilation.compiled)


@pytest.mark.parametrize("remat,forward", [(False, 1), (True, 2)])
def test_kernels_of_a_train_step(remat, forward):
    """All directions at once, and four backward. With remat the forward kernel runs once more, and no others."""
    assert kernels_of_a_step(remat) == {"propagation_on_chip": forward, "propagation_backward": 4}
