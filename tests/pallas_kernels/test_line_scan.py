import functools
import pathlib
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import DIRECTIONS, reference, row_stochastic
from tests.pallas_kernels import numpy_scan
from tests.tolerances import assert_close

line_scan = jax.jit(pallas_kernels.line_scan, static_argnames=("direction", "chunk"))
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SIZES = st.sampled_from([(1, 1), (1, 5), (4, 1), (3, 4), (6, 5)])
SHAPES = [(2, 7, 9, 6), (1, 1, 5, 4), (2, 6, 1, 4), *(
    pytest.param(shape, marks=pytest.mark.full) for shape in ((1, 1, 1, 2), (3, 17, 8, 12))
)]  # fmt: skip


def draw(shape, weight_channels=None, seed=0, dtype: Any = np.float64) -> tuple[Any, Any, Any]:
    """x, row-stochastic weights and lam of a map."""
    rng = np.random.default_rng(seed)
    batch, height, width, channels = shape
    weights = rng.uniform(0.1, 1, (batch, height, width, 3, weight_channels or channels))
    weights /= weights.sum(axis=3, keepdims=True)
    return rng.normal(size=shape).astype(dtype), weights.astype(dtype), rng.normal(size=shape).astype(dtype)


def reference_scan(x, weights, lam, direction, chunk=None):
    """The reference without the operations' gradient rule."""
    options: Any = dict(directions=(direction,), chunk=chunk, from_logits=False)
    return reference.scan_forward(x, weights[:, :, :, None], lam[:, :, :, None], **options)[:, 0]


def turn(array, direction):
    """A map that runs to the right (B, H, W, ...), turned so that it runs in `direction`."""
    array = array[:, :, ::-1] if direction in ("left", "up") else array
    return array.swapaxes(1, 2) if direction in ("down", "up") else array


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.full)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["line_scan_global", "line_scan_chunk4"])
def test_golden_outputs_and_gradients(name, direction, dtype):
    with np.load(GOLDEN / f"{name}.npz") as saved:
        golden = dict(saved)
    length = golden["x"].shape[-1]
    chunk = int(golden["chunk"]) if int(golden["chunk"]) < length else None
    assert (chunk is None) == (name == "line_scan_global")

    def maps(array):  # (N, C, H, W) to (N, H, W, C)
        return turn(array.transpose(0, 2, 3, 1), direction).astype(dtype)

    def rows(array):  # (3, N, C, H, W) to (N, H, W, 3, C)
        return turn(array.transpose(1, 3, 4, 0, 2), direction).astype(dtype)

    with jax.enable_x64(True):
        inputs = [jnp.asarray(a) for a in (maps(golden["x"]), rows(golden["weights"]), maps(golden["lam"]))]
        h, vjp = jax.vjp(lambda *args: line_scan(*args, direction=direction, chunk=chunk), *inputs)
        gradients = vjp(jnp.asarray(maps(golden["grad_h"])))
    assert_close(h, maps(golden["h"]), name="h")
    for got, key, layout in zip(gradients, ("x", "weights", "lam"), (maps, rows, maps), strict=True):
        assert_close(got, layout(golden[f"grad_{key}"]), name=f"grad_{key}")


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_a_loop_over_pixels(shape, direction, chunk):
    weight_channels = {None: shape[-1], 1: 1, 3: shape[-1] // 2, 100: shape[-1]}[chunk]
    x, weights, lam = draw(shape, weight_channels)
    want = numpy_scan.line_scan(x, weights, lam, direction, chunk)
    with jax.enable_x64(True):
        assert_close(line_scan(x, weights, lam, direction=direction, chunk=chunk), want)


@pytest.mark.parametrize("weight_channels,chunk", [
    (2, 3),
    *(pytest.param(*case, marks=pytest.mark.full) for case in ((6, None), (6, 3), (2, None), (1, None), (1, 3))),
])  # fmt: skip
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_rule_agrees_with_plain_autodiff(direction, weight_channels, chunk):
    inputs = draw((2, 5, 8, 6), weight_channels, seed=1)
    grad_h = np.random.default_rng(2).normal(size=inputs[0].shape)
    with jax.enable_x64(True):
        _, ruled = jax.vjp(lambda *args: line_scan(*args, direction=direction, chunk=chunk), *inputs)
        _, plain = jax.vjp(functools.partial(reference_scan, direction=direction, chunk=chunk), *inputs)
        for name, got, want in zip("x weights lam".split(), ruled(grad_h), plain(grad_h), strict=True):
            assert_close(got, want, name=name)


@pytest.mark.parametrize("shape,weight_channels,direction,chunk", [
    ((1, 3, 4, 2), 2, "right", None), ((2, 4, 3, 2), 1, "up", 3), ((1, 1, 4, 2), 2, "down", None),
    ((1, 4, 1, 4), 2, "left", 2), ((1, 1, 1, 1), 1, "right", 1),
])  # fmt: skip
def test_gradients_agree_with_finite_differences(shape, weight_channels, direction, chunk):
    with jax.enable_x64(True):
        inputs = [jnp.asarray(array) for array in draw(shape, weight_channels, seed=3)]
        jax.test_util.check_grads(
            lambda *args: line_scan(*args, direction=direction, chunk=chunk), inputs, order=1, modes=["rev"], rtol=1e-6
        )


@pytest.mark.parametrize("dtype", [
    "bfloat16", *(pytest.param(dtype, marks=pytest.mark.full) for dtype in ("float32", "float16")),
])  # fmt: skip
def test_16_bit_inputs_keep_a_float32_state(dtype):
    x, weights, lam = draw((2, 9, 64, 8), seed=4, dtype=np.float32)
    x, lam = jnp.asarray(x, dtype), jnp.asarray(lam, dtype)
    grad_h = jnp.asarray(np.random.default_rng(5).normal(size=x.shape), dtype)
    wide: Any = [np.asarray(array, np.float64) for array in (x, weights, lam)]
    for direction in ("right", "up"):
        h, vjp = jax.vjp(lambda *args, way=direction: line_scan(*args, direction=way), x, weights, lam)
        assert_close(h, numpy_scan.line_scan(*wide, direction=direction), dtype=dtype, name="h")
        with jax.enable_x64(True):
            _, wide_vjp = jax.vjp(functools.partial(reference_scan, direction=direction), *wide)
            wants = wide_vjp(np.asarray(grad_h, np.float64))
        for name, got, want, kind in zip("xwl", vjp(grad_h), wants, (dtype, "float32", dtype), strict=True):
            # The gradient of the weights is float32, but it is computed from h, which was kept in x's dtype.
            assert_close(got, want, dtype=kind, tolerance=4e-3 if kind != dtype else None, name=name)


def test_jit_vmap_remat_and_repeatability():
    stack = [np.stack([draw((2, 5, 6, 4), seed=seed, dtype=np.float32)[i] for seed in range(3)]) for i in range(3)]

    def loss(x, weights, lam):
        return jnp.sum(jnp.sin(line_scan(x, weights, lam, direction="left", chunk=4)))

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    wants = [gradient(*(array[i] for array in stack)) for i in range(3)]
    mapped = jax.vmap(gradient)(*stack)
    remat = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)))
    for i, want in enumerate(wants):
        once, again = remat(*(array[i] for array in stack)), remat(*(array[i] for array in stack))
        for k in range(3):
            assert_close(mapped[k][i], want[k])
            assert_close(once[k], want[k])
            np.testing.assert_array_equal(once[k], again[k])


@hypothesis.given(size=SIZES, direction=st.sampled_from(DIRECTIONS), seed=st.integers(0, 99))
def test_flipped_image_scans_like_the_opposite_direction(size, direction, seed):
    x, weights, lam = draw((1, *size, 2), seed=seed, dtype=np.float32)
    opposite = dict(zip(("right", "down", "left", "up"), ("left", "up", "right", "down"), strict=True))[direction]
    axis = 1 if direction in ("down", "up") else 2
    flipped = line_scan(*(np.flip(array, axis) for array in (x, weights, lam)), direction=opposite)
    np.testing.assert_array_equal(flipped, np.flip(line_scan(x, weights, lam, direction=direction), axis))


@pytest.mark.full
@hypothesis.given(
    size=SIZES, chunk=st.sampled_from([None, 2]),
    direction=st.sampled_from(DIRECTIONS), seed=st.integers(0, 99), scale=st.floats(-8, 8),
)  # fmt: skip
def test_linear_in_x(size, chunk, direction, seed, scale):
    x, weights, lam = draw((1, *size, 2), seed=seed)
    other = draw((1, *size, 2), seed=seed + 100)[0]

    def scan(array):
        return line_scan(array, weights, lam, direction=direction, chunk=chunk)

    with jax.enable_x64(True):
        assert_close(scan(x + scale * other), scan(x) + scale * scan(other))


@pytest.mark.full
@hypothesis.given(
    size=SIZES, direction=st.sampled_from(DIRECTIONS),
    seed=st.integers(0, 99), scale=st.sampled_from([0.1, 3.0, 40.0]),
)  # fmt: skip
def test_state_is_bounded_by_the_inputs_so_far(size, direction, seed, scale):
    x, _, lam = draw((1, *size, 3), seed=seed, dtype=np.float32)
    logits = np.random.default_rng(seed).normal(0, scale, (1, *size, 3, 3)).astype(np.float32)
    h = line_scan(x, row_stochastic(logits, direction=direction), lam, direction=direction)

    def largest_on_lines(array):  # in the order of the walk
        lines = np.abs(np.asarray(array)).max(axis=(0, 2, 3) if direction in ("down", "up") else (0, 1, 3))
        return lines[::-1] if direction in ("left", "up") else lines

    largest, states = largest_on_lines(lam * x), largest_on_lines(h)
    assert np.all(states <= np.cumsum(largest) * (1 + 1e-5) + 1e-30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("repeated", [True, False])
def test_stability_context_condition_over_4096_lines(dtype, repeated):
    """With lam = 1 on the first line, 0 after, and x = 1, every state is a mean of ones."""
    lines, pixels, channels = 4096, 5, 16
    rng = np.random.default_rng(6)
    scale = np.array([0.0, 0.1, 1, 3, 10, 30, 60, 100] * 2)
    logits = rng.normal(size=(1, 1 if repeated else lines, pixels, 3, channels)) * scale
    logits = jnp.asarray(np.broadcast_to(logits, (1, lines, pixels, 3, channels)), dtype)
    lam = np.zeros((1, lines, pixels, channels), np.float32)
    lam[:, 0] = 1
    h = line_scan(np.ones_like(lam), row_stochastic(logits, direction="down"), lam, direction="down")
    assert float(jnp.max(jnp.abs(h - 1))) <= 1e-4
