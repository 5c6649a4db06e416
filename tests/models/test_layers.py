import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.models.layers import chained, gelu
from tests.tolerances import assert_close


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gelu_agrees_with_its_formula_also_where_it_is_small(dtype):
    x = jnp.linspace(-4, 4, 161, dtype=dtype)
    want = [0.5 * v * math.erfc(-v / math.sqrt(2)) for v in np.asarray(x, np.float64)]
    got = np.asarray(gelu(x, approximate=False), np.float64)
    np.testing.assert_allclose(got, want, rtol=0.6 * float(jnp.finfo(dtype).eps), atol=1e-6)
    assert gelu(x, approximate=False).dtype == x.dtype


def test_chained_keeps_its_input_alone_and_changes_no_gradient():
    x, kernel = (jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32) for shape in ((5, 3), (3, 7)))

    def product(y):
        return y @ kernel

    y, vjp = jax.vjp(chained(jnp.sin, jnp.exp, product), x)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(vjp)) == [kernel.shape, x.shape]
    want, plain = jax.vjp(lambda x: product(jnp.exp(jnp.sin(x))), x)
    assert_close(y, want)
    assert_close(vjp(y)[0], plain(y)[0])
