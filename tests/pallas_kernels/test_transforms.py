"""Export with a symbolic batch; forward mode is refused, reverse mode twice works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels import (
    UpProjection,
    line_scan,
    line_scan_from_logits,
    propagate_low_rank,
    row_stochastic,
)
from tests.pallas_kernels.test_line_scan import draw as draw_scan
from tests.pallas_kernels.test_low_rank import draw as draw_low_rank
from tests.tolerances import assert_close

UP = UpProjection(*(jnp.asarray(columns) for columns in draw_low_rank((1, 8, 8, 8), rank=3, dtype=np.float32)[2]))


def from_weights(x):
    return line_scan(x, row_stochastic(jnp.stack([x, 2 * x, -x], axis=3), direction="up"), x, direction="up", chunk=3)


def from_logits(x):
    return line_scan_from_logits(x, jnp.stack([x, 2 * x, -x], axis=3), 1 - x, direction="left")


def from_proxy(x):
    return propagate_low_rank(x, x[..., :3], UP, jnp.asarray([1.0, -2.0, 0.5, 3.0]), chunk=3)


def gradient(x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(from_logits(x))))(x)


def gradient_from_proxy(x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(from_proxy(x))))(x)


@pytest.mark.parametrize("operation", [from_weights, from_proxy, gradient, gradient_from_proxy])
def test_one_export_serves_every_batch_size(operation):
    """The program is exported once with a symbolic batch; a batch of 3 gives the results of its images."""
    operation = jax.jit(operation)
    exported = export.export(operation)(jax.ShapeDtypeStruct(export.symbolic_shape("b, 8, 8, 8"), jnp.float32))
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 8)).astype(np.float32)
    assert_close(exported.call(x), operation(x))


def test_an_export_with_a_symbolic_batch_under_a_mesh_is_not_split():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2])
    with jax.set_mesh(mesh):
        traced = jax.eval_shape(from_weights, jax.ShapeDtypeStruct(export.symbolic_shape("b, 8, 8, 8"), jnp.float32))
    assert str(traced.shape) == "(b, 8, 8, 8)"


@pytest.mark.parametrize("operation", [from_weights, from_logits, from_proxy])
def test_forward_mode_is_refused(operation):
    x = jnp.ones((1, 8, 8, 8), jnp.float32)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(operation, (x,), (x,))).lower(x)


@pytest.mark.full
def test_second_derivatives_in_reverse_mode_are_symmetric():
    x, logits, lam = draw_scan((1, 2, 2, 1), seed=3)
    sizes = np.cumsum([array.size for array in (x, logits)])

    def loss(flat):
        parts = [part.reshape(a.shape) for part, a in zip(jnp.split(flat, sizes), (x, logits, lam), strict=True)]
        return jnp.sum(jnp.sin(line_scan_from_logits(*parts, direction="down")))

    with jax.enable_x64(True):
        flat = jnp.concatenate([jnp.ravel(array) for array in (x, logits, lam)])
        hessian = jax.jit(jax.jacrev(jax.jacrev(loss)))(flat)
    assert np.abs(hessian).max() > 0.1
    assert_close(hessian, hessian.T)
