"""Batches of one size on all devices give the same as one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.batching import batched


def test_any_number_of_rows_compiles_once():
    traced = []

    def compute(scale: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
        traced.append(rows.shape)
        return {"sum": (rows * scale).sum(axis=1), "rows": rows}

    run = batched(compute, jnp.float32(2), batch_size=9)  # 16 on the tests' 8 devices
    array = np.arange(70, dtype=np.float32).reshape(35, 2)
    for count in (1, 16, 35):
        found = run(array[:count])
        np.testing.assert_array_equal(found["sum"], 2 * array[:count].sum(axis=1))
        np.testing.assert_array_equal(found["rows"], array[:count])
        assert isinstance(found["sum"], np.ndarray)
    assert traced == [(16, 2)]
    with pytest.raises(ValueError, match=r"array: expected at least one row, got shape \(0, 2\)"):
        run(array[:0])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        batched(compute, jnp.float32(2), batch_size=0)
