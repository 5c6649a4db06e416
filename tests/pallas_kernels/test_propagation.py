import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import DIRECTIONS, reference
from pallas_kernels.merging import merged
from tests.pallas_kernels import numpy_scan
from tests.tolerances import assert_close

propagate = jax.jit(pallas_kernels.propagate, static_argnames=("chunk", "alignment"))


def draw(shape, weight_channels=None, seed=0, dtype: Any = np.float64, skip=True) -> list[Any]:
    """x, logits, lam, gate, skip and merge of a map."""
    rng = np.random.default_rng(seed)
    batch, height, width, channels = shape
    logits = rng.normal(0, 2, (batch, height, width, 4, 3, weight_channels or channels))
    lam, gate, through = rng.normal(size=(3, batch, height, width, 4, channels))
    arrays = [rng.normal(size=shape), logits, lam, gate, through if skip else None, rng.normal(size=4)]
    return [None if array is None else array.astype(dtype) for array in arrays]


@pytest.mark.parametrize("shape,weight_channels,chunk,skip", [
    ((2, 5, 7, 6), 6, None, True), ((2, 6, 1, 4), 2, 2, False),
    *(pytest.param(*case, marks=pytest.mark.full) for case in [
        ((1, 1, 4, 4), 1, None, True), ((1, 8, 8, 2), 2, 3, True), ((1, 1, 1, 1), 1, 1, False),
    ]),
])  # fmt: skip
def test_agrees_with_a_loop_over_pixels(shape, weight_channels, chunk, skip):
    inputs = draw(shape, weight_channels, skip=skip)
    with jax.enable_x64(True):
        assert_close(propagate(*inputs, chunk=chunk), numpy_scan.propagate(*inputs, chunk=chunk))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("size", [1, 5])
def test_unturned_agrees_with_a_loop_over_pixels(size, chunk):
    inputs = draw((2, size, size, 4), seed=1)
    with jax.enable_x64(True):
        want = numpy_scan.propagate_unturned(*inputs, chunk=chunk)
        assert_close(propagate(*inputs, chunk=chunk, alignment="unturned"), want)


def test_unturned_and_aligned_agree_where_nothing_turns():
    """Only "right" needs no turning: if the other directions have merge = 0, both alignments agree."""
    inputs = draw((1, 4, 4, 2), seed=2)
    inputs[-1][1:] = 0
    with jax.enable_x64(True):
        assert_close(propagate(*inputs, alignment="unturned"), propagate(*inputs))
        inputs[-1][1] = 1
        difference = propagate(*inputs, alignment="unturned") - propagate(*inputs)
        assert float(jnp.max(jnp.abs(difference))) > 0.1


def without_rule(x, logits, lam, gate, skip, merge, chunk):
    """`propagate` by the reference, without the scans' gradient rule."""
    h = reference.scan_forward(x, logits, lam, directions=DIRECTIONS, chunk=chunk, from_logits=True)
    return merged(x, h, gate, skip, merge)


@pytest.mark.full
@pytest.mark.parametrize("shape,weight_channels,chunk,skip", [
    ((2, 5, 7, 6), 6, None, True), ((1, 3, 4, 4), 1, 3, True), ((2, 6, 1, 4), 2, 2, False),
])  # fmt: skip
def test_gradient_rule_agrees_with_plain_autodiff(shape, weight_channels, chunk, skip):
    inputs = draw(shape, weight_channels, seed=3, skip=skip)
    grad_y = np.random.default_rng(4).normal(size=shape)
    with jax.enable_x64(True):
        _, ruled = jax.vjp(lambda *args: propagate(*args, chunk=chunk), *inputs)
        _, plain = jax.vjp(functools.partial(without_rule, chunk=chunk), *inputs)
        for name, got, want in zip("x logits lam gate skip merge".split(), ruled(grad_y), plain(grad_y), strict=True):
            assert (got is None) == (want is None) == (name == "skip" and not skip)
            if got is not None:
                assert_close(got, want, name=name)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_16_bit_maps(dtype):
    narrow = [jnp.asarray(array, dtype) for array in draw((2, 8, 6, 4), 2, seed=5)]
    wide: Any = [np.asarray(array, np.float64) for array in narrow]
    grad_y = jnp.asarray(np.random.default_rng(6).normal(size=narrow[0].shape), dtype)
    y, vjp = jax.vjp(propagate, *narrow)
    with jax.enable_x64(True):
        want, wide_vjp = jax.vjp(propagate, *wide)
        wants = wide_vjp(np.asarray(grad_y, np.float64))
    assert_close(y, numpy_scan.propagate(*wide), dtype=dtype, name="y")
    for name, got, gradient in zip("x logits lam gate skip merge".split(), vjp(grad_y), wants, strict=True):
        # Twice the table: gradients of the maps are computed from h, which was kept in x's dtype.
        assert_close(
            got, gradient, dtype=dtype, tolerance={"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}[dtype], name=name
        )


@pytest.mark.full
def test_vmap_and_remat():
    stacks = [
        np.stack(arrays) for arrays in zip(*(draw((1, 4, 5, 2), seed=s, dtype=np.float32) for s in (7, 8)), strict=True)
    ]

    def loss(*inputs):
        return jnp.sum(jnp.cos(propagate(*inputs, chunk=3)))

    gradient = jax.grad(loss, argnums=tuple(range(6)))
    mapped = jax.vmap(gradient)(*stacks)
    remat = jax.grad(jax.checkpoint(loss), argnums=tuple(range(6)))
    for i in range(2):
        single = [array[i] for array in stacks]
        for got, again, want in zip(mapped, remat(*single), gradient(*single), strict=True):
            assert_close(got[i], want)
            assert_close(again, want)
