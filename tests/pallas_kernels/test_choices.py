"""The record of choices, and the layer names in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UpProjection, line_scan, named_layer, propagate_low_rank, record_choices
from pallas_kernels.mosaic import card

SHAPE = (1, 2, 3, 4)


def scan(x, **options):
    weights = jnp.full((*SHAPE[:3], 3, 4), 1 / 3, jnp.float32)
    return line_scan(x, weights, x, direction="down", **options)


def low_rank(x):
    up = UpProjection(jnp.ones((2, 4, 3, 4)), *[jnp.ones((2, 4, 4))] * 3)
    return propagate_low_rank(x, x[..., :2].astype(jnp.bfloat16), up, jnp.ones(4))


def test_choices_are_recorded_in_order_with_their_reason():
    def run(x):
        return scan(x, chunk=2), low_rank(x), scan(x, implementation="xla")

    with record_choices() as choices:
        jax.eval_shape(run, jnp.ones(SHAPE))
    jax.eval_shape(lambda x: scan(x), jnp.ones(SHAPE))
    assert [(c.operation, c.shape, c.chunk, c.implementation) for c in choices] == [
        ("line_scan", SHAPE, 2, "xla"), ("propagate_low_rank", SHAPE, None, "xla"), ("line_scan", SHAPE, None, "xla"),
    ]  # fmt: skip
    assert all(c.variants is None for c in choices)
    assert "mosaic" in choices[0].reason and choices[2].reason == "asked for"


def test_choices_of_kernels_name_their_variants():
    with card.assume(card.H200), record_choices() as choices:
        jax.eval_shape(low_rank, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    (choice,) = choices
    assert (choice.operation, choice.implementation) == ("propagate_low_rank", "mosaic")
    assert choice.variants is not None and str(choice.variants).startswith(f"{choice.variants.inference}; in training ")
    assert "variants estimated for" in choice.reason


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.grad], ids=["jit", "remat", "gradient"])
def test_choices_carry_the_innermost_layer_name(wrap):
    def model(x):
        for name in ("blocks/0", "blocks/1"):
            with named_layer("model"), named_layer(name):
                x = scan(x)
        with named_layer("last"):
            x = low_rank(x)
        return jnp.sum(scan(x))

    with record_choices() as choices:
        jax.eval_shape(wrap(model), jnp.ones(SHAPE))
    assert [choice.layer for choice in choices] == ["blocks/0", "blocks/1", "last", None]


def test_a_layer_name_ends_with_its_block_also_after_an_error():
    with pytest.raises(ValueError, match="direction"), named_layer("broken"):
        line_scan(jnp.ones(SHAPE), jnp.ones((*SHAPE[:3], 3, 4)), jnp.ones(SHAPE), direction="north")
    with record_choices() as choices:
        jax.eval_shape(lambda x: scan(x), jnp.ones(SHAPE))  # a new function, which JAX has not traced before
    assert choices[0].layer is None


def test_a_layer_name_does_not_change_the_program():
    x = np.ones(SHAPE, np.float32)

    def named(x):
        with named_layer("blocks/0"):
            return scan(x)

    assert str(jax.make_jaxpr(named)(x)) == str(jax.make_jaxpr(scan)(x))
