import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.benchmarks.models import multiply_adds, propagation_multiply_adds
from gspn_jax import models
from pallas_kernels import record_choices


def test_counts_of_single_operations():
    x, kernel = jnp.zeros((2, 8, 6, 4)), jnp.zeros((3, 3, 2, 10))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    assert multiply_adds(convolve, x, kernel) == 2 * 4 * 3 * 10 * (3 * 3 * 2)
    assert multiply_adds(lambda a: jnp.einsum("bhwc,cd->bhwd", a, jnp.zeros((4, 5))), x) == 2 * 8 * 6 * 4 * 5
    assert multiply_adds(jax.jit(lambda a: jax.lax.map(lambda b: b @ jnp.zeros((4, 7)), a)), x) == 2 * 8 * 6 * 4 * 7


@pytest.mark.full
def test_gspn_t_has_the_papers_multiply_adds():
    """5.24 G in convolutions and linear layers by the released code, 5.3 in the paper's table."""
    model = nnx.eval_shape(lambda: models.create_model("gspn_t", num_classes=1000, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    with record_choices() as choices:
        dense = multiply_adds(lambda p, x: nnx.merge(graph, p)(x), params, image)
    scans = propagation_multiply_adds(choices)
    # Theirs counts the merge as a convolution; here it is one seventh of the propagation. And it makes the skips of
    # four directions, where `xla` makes their sum: 0.05 G less.
    assert round((dense + scans / 7) / 1e9, 2) == 5.19
    assert 0.05e9 < scans < 0.1e9
