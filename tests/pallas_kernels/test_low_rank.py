"""Propagation of maps made from a proxy, against `propagate` of the same maps and against a loop over pixels."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import UpProjection, propagate, propagate_low_rank, record_choices, reference
from pallas_kernels.tolerances import TOLERANCES
from pallas_kernels.up_projection import gradients_of_maps, maps_of
from tests.pallas_kernels import numpy_scan
from tests.tolerances import assert_close

SHAPE, RANK = (2, 3, 5, 4), 6


def draw(shape=SHAPE, rank=RANK, weight_channels=None, seed=0, dtype: Any = np.float64, skip=True) -> list[Any]:
    """x, proxy, up and merge."""
    rng = np.random.default_rng(seed)
    channels = shape[-1]
    sizes = (4, 3, weight_channels or channels), *[(4, channels)] * 3
    columns: Any = [rng.normal(0, rank**-0.5, (rank, *size)).astype(dtype) for size in sizes]
    up = UpProjection(*columns)
    up = up if skip else up._replace(skip=None)
    x, proxy, merge = rng.normal(size=shape), rng.normal(size=(*shape[:3], rank)), rng.normal(size=4)
    return [x.astype(dtype), proxy.astype(dtype), up, merge.astype(np.float32 if dtype != np.float64 else dtype)]


UP = draw(dtype=np.float32)[2]


@pytest.mark.parametrize("weight_channels,chunk,skip", [
    (2, 3, True), *(pytest.param(*case, marks=pytest.mark.full) for case in ((4, None, True), (1, 2, False))),
])  # fmt: skip
def test_agrees_with_a_loop_over_pixels(weight_channels, chunk, skip):
    x, proxy, up, merge = draw(weight_channels=weight_channels, skip=skip)
    maps: Any = [None if columns is None else np.tensordot(proxy, columns, 1) for columns in up]
    logits, lam, gate, through = maps
    with jax.enable_x64(True):
        y = propagate_low_rank(x, proxy, up, merge, chunk=chunk)
        assert_close(y, numpy_scan.propagate(x, logits, lam, gate, through, merge, chunk=chunk))


def of_arrays(x, proxy, up, merge, **options):
    """`propagate_low_rank` by way of arrays of maps."""
    return propagate(x, *maps_of(proxy, up), merge, **options)


@pytest.mark.parametrize("shape,weight_channels,chunk,skip,block_bytes", [
    ((2, 6, 5, 4), 2, None, True, 2**20), ((2, 5, 7, 6), 1, 3, False, 1),
    *(pytest.param(*case, marks=pytest.mark.full) for case in [
        ((1, 6, 8, 4), 4, None, True, 4000), ((1, 1, 9, 4), 4, None, True, 1), ((2, 7, 1, 4), 1, 2, True, 2**20),
        ((1, 8, 12, 2), 2, 4, False, 800), ((1, 1, 1, 1), 1, 1, True, 1),
    ]),
])  # fmt: skip
def test_outputs_and_gradients_are_those_of_arrays_of_maps(
    monkeypatch, shape, weight_channels, chunk, skip, block_bytes
):
    """Also where the maps of a line, of some lines or of all lines are made at a time."""
    monkeypatch.setattr(reference, "_BLOCK_BYTES", block_bytes)
    arrays = draw(shape, 3, weight_channels, seed=2, skip=skip)
    grad_y = np.random.default_rng(3).normal(size=shape)
    with jax.enable_x64(True):
        got, want = (
            jax.jit(functools.partial(gradients_of, functools.partial(operation, chunk=chunk)))(arrays, grad_y)
            for operation in (propagate_low_rank, of_arrays)
        )
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_close(one, other)


def gradients_of(operation, arrays, grad_y):
    """The result of an operation and the gradients of its arrays."""
    y, vjp = jax.vjp(operation, *arrays)
    return y, vjp(grad_y)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.full) for d in ("float32", "float16"))]
)
def test_rounding_is_that_of_the_dtype(dtype):
    *arrays, merge = draw((2, 8, 6, 4), 3, 2, seed=4, dtype=np.float32)
    given = [*jax.tree.map(lambda array: jnp.asarray(array, dtype), arrays), merge]
    grad_y = jnp.asarray(np.random.default_rng(5).normal(size=(2, 8, 6, 4)), dtype)
    operation = jax.jit(functools.partial(gradients_of, propagate_low_rank))
    y, gradients = operation(given, grad_y)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda array: np.asarray(array, np.float64), (given, grad_y))
        want, want_gradients = operation(*wide)
    # Twice the table: the maps are rounded to the proxy's dtype, h to that of x, and then the result.
    tolerance = 2 * TOLERANCES[dtype]
    assert_close(y, want, dtype=dtype, tolerance=tolerance)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        assert_close(one, other, dtype=one.dtype, tolerance=tolerance)


def test_keeps_no_maps_for_the_gradient():
    """Between forward and backward there are the inputs and h of the four directions."""
    arrays = draw((2, 6, 8, 16), dtype=np.float32)
    kept = jax.eval_shape(lambda *arrays: jax.vjp(propagate_low_rank, *arrays)[1], *arrays)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(kept))
    assert sizes == sorted([array.size for array in jax.tree.leaves(arrays)] + 4 * [arrays[0].size])


def test_no_array_of_the_program_is_larger_than_x(monkeypatch):
    """Forward and backward: the 24 values per pixel and channel are made some lines at a time."""
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 2**14)
    arrays = draw((2, 16, 12, 16), 4, dtype=np.float32)

    def largest(operation) -> int:
        program = jax.jit(functools.partial(gradients_of, operation)).lower(arrays, arrays[0]).compile()
        shapes = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", str(program.as_text()))
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(propagate_low_rank) == arrays[0].size
    assert largest(of_arrays) == 12 * arrays[0].size


@pytest.mark.parametrize("skip", [True, False])
def test_gradients_of_maps_are_those_of_autodiff(skip):
    _, proxy, up, _ = draw(weight_channels=2, skip=skip)
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        maps, vjp = jax.vjp(maps_of, jnp.asarray(proxy), up)
        grads = jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape)), maps)
        want = vjp(grads)
        repeated = jnp.repeat(grads[0], 2, axis=-1) / 2  # as kernels give it, for each channel
        for logits in (grads[0], repeated):
            got = gradients_of_maps(jnp.asarray(proxy), up, (logits, *grads[1:]))
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                assert_close(one, other)


@pytest.mark.parametrize("name,value,words", [
    ("proxy", np.zeros((2, 3, 6, 6), np.float32), ("(B, H, W, S)", "(2, 3, 6, 6)")),
    ("proxy", np.zeros((2, 3, 5, 6), np.int32), ("float32", "int32")),
    ("up", UP._replace(lam=None), ("up.lam", "None")),
    ("up", UP._replace(lam=np.zeros((6, 4, 5), np.float32)), ("up.lam", "(6, 4, 4)", "(6, 4, 5)")),
    ("up", UP._replace(logits=np.zeros((5, 4, 3, 4), np.float32)), ("(6, 4, 3, 4)", "(5, 4, 3, 4)")),
    ("up", UP._replace(logits=np.zeros((6, 4, 3, 3), np.float32)), ("divide C = 4", "got 3")),
    ("up", (1, 2, 3, 4), ("UpProjection", "tuple")),
    ("merge", np.zeros(3, np.float32), ("(4,)", "(3,)")),
    ("variant", "low_rank", ("xla", "'low_rank'")),
    ("variant", "fastest", ("low_rank_on_chip", "'fastest'")), ("variant", 5, ("low_rank_on_chip", "5")),
    ("chunk", 0, ("at least 1", "0")),
])  # fmt: skip
def test_bad_arguments(name, value, words):
    arguments = dict(zip(("x", "proxy", "up", "merge"), draw(dtype=np.float32), strict=True)) | {name: value}
    with pytest.raises(ValueError) as error:
        propagate_low_rank(**arguments)
    assert str(error.value).startswith(name)
    assert all(word in str(error.value) for word in words), str(error.value)


def loss(x, proxy, up, merge, implementation="mosaic_interpret"):
    variant = None if implementation == "xla" else "low_rank"
    y = propagate_low_rank(x, proxy, up, merge, implementation=implementation, variant=variant)
    return jnp.sum(y.astype(jnp.float32) ** 2)


def narrow(shape, weight_channels, seed=0) -> list[Any]:
    *arrays, merge = draw(shape, 5, weight_channels, seed, np.float32)
    return [*jax.tree.map(lambda array: jnp.asarray(array, "bfloat16"), arrays), jnp.asarray(merge)]


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["xla", "mosaic_interpret"])
def test_on_a_mesh(implementation):
    """The gradients of arrays that several devices hold whole are summed over the devices."""
    arrays = narrow((2, 2, 3, 16), weight_channels=1)
    gradient = jax.jit(jax.grad(functools.partial(loss, implementation=implementation), argnums=(0, 1, 2, 3)))
    want = gradient(*arrays)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    x, proxy, up, merge = arrays
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data", None, None, "model")))
        proxy = jax.device_put(proxy, NamedSharding(mesh, P("data")))
        got = gradient(x, proxy, up, merge)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(one, other)


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["xla", "mosaic_interpret"])
def test_vmap_of_images_and_of_projections(implementation):
    """A mapped axis of images joins the batch; projections of several models run one after the other."""
    one, other = narrow((1, 3, 4, 8), 8), narrow((1, 3, 4, 8), 8, seed=1)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), one, other)
    gradient = jax.jit(jax.grad(functools.partial(loss, implementation=implementation), argnums=(0, 1)))
    with record_choices() as choices:
        images = jax.vmap(gradient, in_axes=(0, 0, None, None))(stacked[0], stacked[1], one[2], one[3])
        models = jax.vmap(gradient)(*stacked)
    of_kernels = "low_rank; in training low_rank, backward low_rank"
    assert {str(choice.variants) for choice in choices} == {"None" if implementation == "xla" else of_kernels}
    for k, arrays in enumerate((one, other)):
        for got, want in zip(images, gradient(arrays[0], arrays[1], one[2], one[3]), strict=True):
            assert_close(got[k], want)
        for got, want in zip(models, gradient(*arrays), strict=True):
            assert_close(got[k], want)
