import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.models import parameter_count
from gspn_jax.text import CLIPText
from gspn_jax.weights import read_arrays
from gspn_jax.weights.clip import clip_text
from tests.tolerances import assert_close
from tests.weights.tensor_names import published_shapes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "text_to_image"
CONFIGS = {
    "l": {"num_attention_heads": 4, "eos_token_id": 2},  # quick_gelu is the default
    "g": {"num_attention_heads": 4, "eos_token_id": 2, "hidden_act": "gelu"},
}


def golden(tower: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns parameters by name; inputs and outputs by name."""
    with np.load(GOLDEN / f"clip_{tower}_tiny.npz") as saved:
        arrays = dict(saved)
    parameters = {name: arrays.pop(name) for name in list(arrays) if name.startswith("param/")}
    return {name.removeprefix("param/"): array for name, array in parameters.items()}, arrays


ARRAYS, OUTPUTS = golden("g")


def run(tower: CLIPText, ids) -> dict[str, jax.Array]:
    graph, state = nnx.split(tower)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix float32 with other dtypes
        return jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, jnp.asarray(ids, jnp.int32))


@pytest.mark.parametrize("name", ["l", "g"])
def test_outputs_of_the_published_program(name):
    arrays, outputs = golden(name)
    pooled = outputs["pooled" if name == "l" else "text_embeds"]
    with jax.enable_x64(True):
        got = run(clip_text(arrays, CONFIGS[name], dtype=jnp.dtype("float64")), outputs["ids"])
        for key, want in (("last", outputs["last"]), ("penultimate", outputs["penultimate"]), ("pooled", pooled)):
            assert got[key].dtype == jnp.float64
            np.testing.assert_allclose(got[key], want, atol=1e-9, rtol=0, err_msg=key)


@pytest.mark.full
def test_the_comparison_sees_activation_heads_and_epsilon():
    ids, want = OUTPUTS["ids"], OUTPUTS["last"]
    assert np.abs(run(clip_text(ARRAYS, CONFIGS["g"]), ids)["last"] - want).max() < 1e-5
    for change in ({"hidden_act": "quick_gelu"}, {"num_attention_heads": 8}, {"layer_norm_eps": 1e-3}):
        other = run(clip_text(ARRAYS, CONFIGS["g"] | change), ids)["last"]
        assert np.abs(np.asarray(other) - want).max() > 1e-4, change


def test_embeddings_of_the_published_pipelines():
    """In the published folders' layout; SD-1.5's file holds integer position ids."""

    def encoded(folder: str, ids: np.ndarray) -> dict[str, jax.Array]:
        config = json.loads((GOLDEN / folder / "config.json").read_text())
        return run(clip_text(read_arrays(GOLDEN / folder / "model.safetensors"), config), ids)

    with np.load(GOLDEN / "pipeline_sd15.npz") as saved:
        got = encoded("sd15_folder/text_encoder", saved["ids"][:4])  # of two prompts, then of two negative ones
        np.testing.assert_allclose(got["last"][:2], saved["embeds"], atol=1e-5)
        np.testing.assert_allclose(got["last"][2:], saved["negative_embeds"], atol=1e-5)
    with np.load(GOLDEN / "pipeline_sdxl.npz") as saved:
        first = encoded("sdxl_folder/text_encoder", saved["ids"][:2])
        second = encoded("sdxl_folder/text_encoder_2", saved["ids_2"][:2])
        embeds = np.concatenate([first["penultimate"], second["penultimate"]], axis=-1)
        np.testing.assert_allclose(embeds, saved["embeds"], atol=1e-5)
        np.testing.assert_allclose(second["pooled"], saved["pooled"], atol=1e-5)


@pytest.mark.parametrize("file,count,heads", [("clipL", 123_060_480, 12), ("bigG", 694_659_840, 20)])
def test_parameters_of_the_published_towers(file, count, heads):
    """Names and shapes of the real files; a name that is missing or left over would be an error."""
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in published_shapes(file).items()}
    tower = clip_text(arrays, {"num_attention_heads": heads})
    assert parameter_count(tower) == count and tower.length == 77


def test_names_of_all_ages_are_read():
    want = jax.tree.leaves(nnx.state(clip_text(ARRAYS, CONFIGS["g"])))
    for prefix in ("", "text_model."):
        arrays = {name.replace("text_model.", prefix): array for name, array in ARRAYS.items()}
        arrays[f"{prefix}embeddings.position_ids"] = np.arange(16)[None]
        got = jax.tree.leaves(nnx.state(clip_text(arrays, CONFIGS["g"])))
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_where_the_pooled_vector_is_read():
    """Old configs name id 2, and mean the largest; others name the id itself, of which the first counts."""
    arrays, _ = golden("l")
    assert clip_text(arrays, {}).end is None and clip_text(arrays, {"eos_token_id": 49407}).end == 49407
    ids = np.array([[95, 2, 9, 96, 5, 96], [95, 3, 9, 9, 5, 3]])
    for end, positions in ((2, (3, 0)), (3, (0, 1))):
        got = run(clip_text(arrays, CONFIGS["l"] | {"eos_token_id": end}), ids)
        np.testing.assert_array_equal(got["pooled"], got["last"][jnp.arange(2), jnp.array(positions)])


def test_a_token_sees_those_before_it():
    tower = clip_text(ARRAYS, CONFIGS["g"])
    ids = np.array([[1, 2, 3, 4, 5]])
    got, other = run(tower, ids), run(tower, np.where(ids == 4, 7, ids))
    for key in ("last", "penultimate"):
        changed = np.abs(np.asarray(got[key] - other[key])).max(axis=2)[0] > 1e-3
        np.testing.assert_array_equal(changed, [False, False, False, True, True])


def test_bfloat16_is_close():
    tower = clip_text(ARRAYS, CONFIGS["g"], dtype=jnp.dtype("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(tower))} == {jnp.dtype("bfloat16")}
    got = run(tower, OUTPUTS["ids"])
    for key, want in (("last", "last"), ("penultimate", "penultimate"), ("pooled", "text_embeds")):
        assert_close(got[key], OUTPUTS[want], dtype="float32", tolerance=0.02)


@pytest.mark.parametrize("change,words", [
    ({"hidden_act": "relu"}, "config: expected hidden_act to be 'quick_gelu' or 'gelu', got 'relu'"),
    ({"hidden_act": ["gelu"]}, "config: expected hidden_act to be"),
    ({"model_type": "clip"}, "config: expected model_type to be 'clip_text_model', got 'clip'"),
    ({"num_attention_heads": 5}, "config: expected num_attention_heads to be a divisor of 32, got 5"),
    ({"num_attention_heads": "4"}, "config: expected num_attention_heads to be"),
    ({"layer_norm_eps": None}, "config: expected layer_norm_eps to be between 0 and 1, got None"),
    ({"eos_token_id": [2]}, "config: expected eos_token_id to be an integer, got"),
])  # fmt: skip
def test_configs_of_other_networks_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        clip_text(ARRAYS, CONFIGS["g"] | change)


def test_bad_input_is_refused():
    tower = clip_text(ARRAYS, CONFIGS["g"])
    for ids in (jnp.zeros((1, 17), int), jnp.zeros(5, int), jnp.zeros((1, 5))):
        with pytest.raises(ValueError, match=r"ids: expected integers of shape \(B, T\), T at most 16, got"):
            tower(ids)
    name = "text_model.encoder.layers.2.mlp.fc1.bias"
    for change, words in (
        ({name: None}, f"{name.removeprefix('text_model.')}, which is missing"),
        ({"text_model.extra": np.zeros(1)}, "parameters of a CLIPTextModel, got 1 more: extra"),
        ({"text_model.encoder.layers.4.x": np.zeros(1)}, "encoder.layers.0 to encoder.layers.3 without a gap"),
        ({name: np.full(64, np.nan)}, "expected finite numbers in encoder.layers.2.mlp.fc1.bias, got NaN or Inf"),
    ):
        arrays = {key: array for key, array in (ARRAYS | change).items() if array is not None}
        with pytest.raises(ValueError, match=words):
            clip_text(arrays, CONFIGS["g"])
    for change, words in (
        (dict(depth=0), "depth: expected an integer of at least 1, got 0"),
        (dict(num_heads=3), "num_heads: expected a divisor of width = 8, got 3"),
        (dict(activation="relu"), "activation: expected one of quick_gelu, gelu; got 'relu'"),
        (dict(epsilon=0.0), "epsilon: expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            CLIPText(**{**dict(vocabulary=9, width=8, depth=2, hidden=16, num_heads=2), **change}, rngs=nnx.Rngs(0))
