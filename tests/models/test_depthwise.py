import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.models.depthwise import _convolution, depthwise_conv
from tests.tolerances import assert_close


@pytest.mark.parametrize("shape,size", [((2, 9, 7, 5), 7), ((1, 2, 1, 3), 7), ((3, 6, 11, 4), 3), ((1, 1, 1, 2), 5)])
def test_agrees_with_the_grouped_convolution(shape, size):
    rng = np.random.default_rng(0)
    x, kernel, grad = rng.normal(size=shape), rng.normal(size=(size, size, 1, shape[-1])), rng.normal(size=shape)
    with jax.enable_x64(True):
        got, vjp = jax.vjp(jax.jit(depthwise_conv), x, kernel)
        want, plain = jax.vjp(_convolution, jnp.asarray(x), jnp.asarray(kernel))
        assert_close(got, want)
        for name, mine, theirs in zip(("x", "kernel"), vjp(grad), plain(grad), strict=True):
            assert_close(mine, theirs, name=name)


def test_bfloat16_sums_in_float32():
    rng = np.random.default_rng(1)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 16, 16, 8), (7, 7, 1, 8)))
    wide = [array.astype(jnp.float32) for array in (x, kernel)]
    got, vjp = jax.vjp(depthwise_conv, x, kernel)
    want, plain = jax.vjp(_convolution, *wide)
    assert_close(got, want, dtype="bfloat16")
    for mine, theirs in zip(vjp(jnp.ones_like(got)), plain(jnp.ones_like(want)), strict=True):
        assert_close(mine, theirs, dtype="bfloat16")


@pytest.mark.parametrize("shape", [(4, 4, 1, 3), (3, 5, 1, 3), (3, 3, 1, 4), (3, 3, 3, 1)])
def test_bad_kernels(shape):
    with pytest.raises(ValueError, match=r"kernel: expected shape \(n, n, 1, 3\) with n odd, got"):
        depthwise_conv(jnp.zeros((1, 4, 4, 3)), jnp.zeros(shape))
