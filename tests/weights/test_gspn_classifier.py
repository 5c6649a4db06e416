import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from gspn_jax.models import create_model
from gspn_jax.weights import nvlabs_classifier, nvlabs_classifier_arrays

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "classifier_tiny.npz") as saved:
    GOLDEN = dict(saved)
ARRAYS = {name.removeprefix("param/"): array for name, array in GOLDEN.items() if name.startswith("param/")}
IMAGES = jnp.asarray(GOLDEN["image"].transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    "options,key", [({}, "released"), pytest.param(dict(alignment="aligned"), "aligned", marks=pytest.mark.full)]
)
def test_logits_of_the_authors_program(options, key):
    model = nvlabs_classifier(ARRAYS, **options)
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(IMAGES), GOLDEN[f"logits_{key}"], atol=4e-6, rtol=0)


def parameters(model):
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same_parameters(got, want):
    got, want = parameters(got), parameters(want)
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path, strict=True)


@pytest.mark.full
def test_the_comparison_sees_a_wrong_chunk():
    model = nvlabs_classifier(ARRAYS, chunk=1)
    logits = jax.jit(lambda x: model(x))(IMAGES)
    assert float(np.abs(logits - GOLDEN["logits_released"]).max()) > 1e-3


@pytest.mark.parametrize("wrap", [
    lambda arrays: {"model": arrays, "epoch": 3},
    lambda arrays: {f"module.{name}": array for name, array in arrays.items()},
    lambda arrays: {"model": {f"module.{name}": array for name, array in arrays.items()}},
])  # fmt: skip
def test_wrapped_parameters(wrap):
    assert_same_parameters(nvlabs_classifier(wrap(ARRAYS)), nvlabs_classifier(ARRAYS))


def test_way_back():
    back = nvlabs_classifier_arrays(nvlabs_classifier(ARRAYS))
    assert back.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name, strict=True)


def test_the_way_back_survives_safetensors():
    """Which writes an array that is not contiguous in the order of its memory, and says nothing."""
    back = nvlabs_classifier_arrays(nvlabs_classifier(ARRAYS))
    written = safetensors.numpy.load(safetensors.numpy.save(back))
    assert written.keys() == back.keys() and len(back) > 50
    for name, array in back.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


def test_sizes_are_read_off_the_shapes():
    """GSPN-S has another proxy rank, and widths that 8 does not divide."""
    options: Any = dict(widths=(12, 20, 24, 28), depths=(1, 2, 1, 1))
    small = nnx.eval_shape(lambda: create_model("gspn_s", num_classes=7, rngs=nnx.Rngs(0), **options))
    graph, state = nnx.split(small)
    small = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), state))
    again = nvlabs_classifier(nvlabs_classifier_arrays(small), alignment="aligned", global_stages=(3,))
    assert_same_parameters(again, small)
    assert nnx.graphdef(again) == graph


@pytest.mark.parametrize("change,words", [
    (lambda a: a.pop("layers.1.blocks.0.op.out_norm.bias"), ("layers.1.blocks.0.op.out_norm.bias", "missing")),
    (lambda a: a.pop("classifier.head.weight"), ("classifier.head.weight", "missing")),
    (lambda a: a.update({"layers.0.extra": np.zeros(3)}), ("1 more", "layers.0.extra")),
    (lambda a: a.update({"classifier.norm.bias": np.zeros(3)}), ("classifier.norm.bias", "(128,)", "(3,)")),
    (lambda a: a.update({"layers.1000000.blocks.0.x": np.zeros(3)}), ("layers.0 to layers.4", "layers.1000000")),
    (lambda a: a.update({"layers.2.blocks.1000000.x": np.zeros(3)}), ("without a gap", "layers.2.blocks.1000000")),
    (lambda a: a.update({"classifier.head.bias": np.full(10, np.inf)}), ("classifier.head.bias", "NaN or Inf")),
    (lambda a: a.update({"classifier.head.weight": np.array(1.0)}), ("classifier.head.weight", "2 axes", "()")),
    (lambda a: a.update({"layers.0.blocks.0.norm.weight": np.ones((2, 2))}), ("0.norm.weight", "1 axes", "(2, 2)")),
    (lambda a: a.clear(), ("layers.<index>", "0 other")),
])  # fmt: skip
def test_what_does_not_fit_is_named(change, words):
    arrays = dict(ARRAYS)
    change(arrays)
    with pytest.raises(ValueError) as error:
        nvlabs_classifier(arrays)
    assert str(error.value).startswith("arrays: ") and all(word in str(error.value) for word in words), str(error.value)
