import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import DIRECTIONS
from tests.pallas_kernels import numpy_scan
from tests.tolerances import assert_close

row_stochastic = jax.jit(pallas_kernels.row_stochastic, static_argnames="direction")
SIZES = st.sampled_from([(1, 1), (1, 3), (2, 1), (3, 4)])
LOGITS = st.one_of(st.floats(-120, 120, width=32), st.sampled_from([-100.0, -27.0, 0.0, 100.0, 3e38, -3e38]))


@hypothesis.given(
    size=SIZES, direction=st.sampled_from(DIRECTIONS),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]), data=st.data(),
)  # fmt: skip
def test_rows_are_stochastic_for_any_logits(size, direction, dtype, data):
    height, width = size
    count = height * width * 3
    values = np.array(data.draw(st.lists(LOGITS, min_size=count, max_size=count)), np.float32)
    if dtype == "float16":
        values = np.clip(values, -60000, 60000)
    logits = jnp.asarray(values.reshape(1, height, width, 3, 1), dtype)
    weights, vjp = jax.vjp(lambda array: row_stochastic(array, direction=direction), logits)
    assert weights.dtype == jnp.float32
    assert np.all(np.asarray(weights) >= 0)
    np.testing.assert_array_equal(np.asarray(weights, np.float64).sum(axis=3), 1)
    along = np.asarray(weights) if direction in ("right", "left") else np.asarray(weights).swapaxes(1, 2)
    assert np.all(along[:, 0, :, 0] == 0) and np.all(along[:, -1, :, 2] == 0)
    np.testing.assert_allclose(weights, numpy_scan.row_stochastic(np.asarray(logits, np.float64), direction), atol=3e-7)
    (gradient,) = vjp(jnp.ones_like(weights) * jnp.asarray([1.0, -2.0, 3.0])[:, None][None, None, None])
    assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


def test_one_pixel_wide_axis_keeps_only_the_same_pixel():
    weights = row_stochastic(np.full((1, 1, 4, 3, 2), -100, np.float32), direction="right")
    np.testing.assert_array_equal(weights, np.broadcast_to(np.array([0, 1, 0])[:, None], weights.shape))


@pytest.mark.parametrize("direction", [
    "down", *(pytest.param(direction, marks=pytest.mark.full) for direction in ("right", "left", "up")),
])  # fmt: skip
def test_gradients_agree_with_finite_differences_and_the_plain_formula(direction):
    logits = np.random.default_rng(0).normal(0, 2, (2, 3, 4, 3, 2))
    outside = np.zeros(logits.shape)
    along = outside if direction in ("right", "left") else outside.swapaxes(1, 2)
    along[:, 0, :, 0], along[:, -1, :, 2] = 1, 1

    def plain(array):
        share = jax.nn.sigmoid(array) * (1 - outside)
        return share / share.sum(axis=3, keepdims=True)

    with jax.enable_x64(True):
        got, vjp = jax.vjp(lambda array: row_stochastic(array, direction=direction), logits)
        want, plain_vjp = jax.vjp(plain, logits)
        seed = np.random.default_rng(1).normal(size=logits.shape)
        assert_close(got, want)
        assert_close(vjp(seed)[0], plain_vjp(seed)[0])
        jax.test_util.check_grads(
            lambda array: row_stochastic(array, direction=direction),
            (logits,),
            order=2,
            modes=["fwd", "rev"],
            rtol=1e-5,
        )


def test_logits_below_the_floor_count_as_the_floor():
    logits = np.full((1, 3, 1, 3, 1), -100, np.float32)
    logits[0, 1, 0, :, 0] = (-100, -26, -100)
    got = row_stochastic(logits, direction="right")
    np.testing.assert_array_equal(got, row_stochastic(np.maximum(logits, -27), direction="right"))
    shares = 1 / (1 + np.exp([27.0, 26.0, 27.0]))
    np.testing.assert_allclose(got[0, 1, 0, :, 0], shares / shares.sum(), rtol=1e-5)
    gradient = jax.grad(lambda array: row_stochastic(array, direction="right")[0, 1, 0, 1, 0])(logits)
    assert gradient[0, 1, 0, 0, 0] == 0 and gradient[0, 1, 0, 1, 0] > 0.1


@pytest.mark.parametrize("logits,direction,words", [
    (np.zeros((2, 3, 3, 4)), "right", ("logits", "(B, H, W, 3, C_w)", "(2, 3, 3, 4)")),
    (np.zeros((2, 3, 3, 4, 1)), "right", ("logits", "(2, 3, 3, 4, 1)")),
    (np.zeros((2, 0, 3, 3, 1)), "right", ("logits", "at least 1", "(2, 0, 3, 3, 1)")),
    (np.zeros((2, 3, 3, 3, 1), np.int32), "right", ("logits", "float32", "int32")),
    (np.zeros((2, 3, 3, 3, 1)), "east", ("direction", "right, down, left, up", "'east'")),
])  # fmt: skip
def test_bad_arguments(logits, direction, words):
    with pytest.raises(ValueError) as error:
        pallas_kernels.row_stochastic(logits, direction=direction)
    assert all(word in str(error.value) for word in words), str(error.value)
