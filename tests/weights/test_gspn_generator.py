import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.weights import nvlabs_generator, nvlabs_generator_sizes
from tests.tolerances import assert_close, rms_ratio

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "generator_tiny.npz") as saved:
    GOLDEN = dict(saved)
ARRAYS = {name.removeprefix("param/"): array for name, array in GOLDEN.items() if name.startswith("param/")}
INPUTS = (
    jnp.asarray(GOLDEN["latent"].transpose(0, 2, 3, 1)),
    jnp.asarray(GOLDEN["timestep"], jnp.float32),
    jnp.asarray(GOLDEN["label"], jnp.int32),
)


def outputs(**options):
    model = nvlabs_generator(ARRAYS, **options)
    return np.asarray(jax.jit(lambda *args: model(*args))(*INPUTS))


def golden(key):
    return GOLDEN[f"out_{key}"].transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    "options,key", [({}, "released"), pytest.param(dict(alignment="aligned"), "aligned", marks=pytest.mark.full)]
)
def test_outputs_of_the_authors_program(options, key):
    out = outputs(**options)
    assert_close(out, golden(key), dtype="float32", tolerance=4e-6)
    np.testing.assert_allclose(out, golden(key), atol=4e-6, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("options", [dict(chunk=1), dict(global_blocks=(3, 4))])
def test_the_comparison_sees_a_wrong_chunk(options):
    assert rms_ratio(outputs(**options), golden("released")) > 1e-4


def test_wrapped_parameters_and_moving_averages():
    want = dict(nnx.to_flat_state(nnx.state(nvlabs_generator(ARRAYS))))
    other = {name: array + 1 for name, array in ARRAYS.items()}
    for arrays in (
        {f"module.{name}": array for name, array in ARRAYS.items()},
        {"model": ARRAYS, "opt": {}},
        {"model": other, "ema": ARRAYS},
        GOLDEN,
    ):
        got = dict(nnx.to_flat_state(nnx.state(nvlabs_generator(arrays))))
        assert got.keys() == want.keys()
        for path, leaf in want.items():
            np.testing.assert_array_equal(got[path][...], leaf[...], err_msg=str(path), strict=True)


def test_sizes_are_read_off_the_shapes():
    sizes = dict(num_classes=10, width=64, depth=4, patch=2, in_channels=4, proxy_rank=4)
    assert nvlabs_generator_sizes(GOLDEN) == sizes
    shallow = {name: array for name, array in ARRAYS.items() if "blocks.1." not in name}
    shallow["x_embedder.proj.weight"] = np.zeros((64, 3, 4, 4), np.float32)
    shallow["final_layer.linear.weight"] = np.zeros((16 * 2 * 3, 64), np.float32)
    shallow["final_layer.linear.bias"] = np.zeros(16 * 2 * 3, np.float32)
    assert nvlabs_generator_sizes(shallow) == {**sizes, "depth": 2, "patch": 4, "in_channels": 3}
    model = nvlabs_generator(shallow)
    assert nnx.eval_shape(lambda x, t, y: model(x, t, y), jnp.zeros((2, 8, 8, 3)), *INPUTS[1:]).shape == (2, 8, 8, 6)


@pytest.mark.parametrize("change,words", [
    (lambda a: a.pop("out_blocks.1.skip_linear.bias"), ("out_blocks.1.skip_linear.bias", "missing")),
    (lambda a: a.pop("mid_block.x_conv_down.weight"), ("mid_block.x_conv_down.weight", "missing")),
    (lambda a: a.update({"in_blocks.0.extra": np.zeros(3)}), ("GSPN generator", "1 more", "in_blocks.0.extra")),
    (lambda a: a.update({"in_blocks.1.norm.bias": np.zeros(3)}), ("in_blocks.1.norm.bias", "(64,)", "(3,)")),
    (lambda a: a.update({"in_blocks.1.conv2d.weight": np.zeros(3)}), ("in_blocks.1.conv2d.weight", "4 axes", "(3,)")),
    (lambda a: a.update({"x_embedder.proj.weight": np.zeros((64, 16))}), ("x_embedder", "4 axes", "(64, 16)")),
    (lambda a: a.clear(), ("in_blocks.<index>", "0 other")),
])  # fmt: skip
def test_what_does_not_fit_is_named(change, words):
    arrays = dict(ARRAYS)
    change(arrays)
    with pytest.raises(ValueError) as error:
        nvlabs_generator(arrays)
    assert str(error.value).startswith("arrays: ") and all(word in str(error.value) for word in words), str(error.value)
