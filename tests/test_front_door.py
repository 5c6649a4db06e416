"""What a user of the library does with `import gspn_jax` and nothing else of the project."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import gspn_jax
from gspn_jax import mixers, models
from pallas_kernels import record_choices

TINY: dict[str, Any] = dict(num_classes=3, widths=(8,), depths=(1,), global_stages=(0,), stem_stride=1)


call = nnx.jit(lambda model, x: model(x))


@nnx.jit(static_argnames="seed")
def tiny(seed: int) -> Any:
    return gspn_jax.create_model("gspn_nano", rngs=nnx.Rngs(seed), proxy_rank=2, **TINY)


@pytest.fixture(scope="module")
def classifier() -> Any:
    return tiny(seed=0)


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 3)), jnp.float32)


def test_models_are_listed_by_pattern_and_each_builds():
    assert gspn_jax.list_models("dit_*") == ["dit_s2", "dit_b2", "dit_l2", "dit_xl2"]
    assert set(gspn_jax.list_models()) == set(models.PRESETS)
    for name in ("gspn_nano", "gspn_s4", "dit_s2"):
        model = nnx.eval_shape(lambda name=name: gspn_jax.create_model(name, num_classes=2, rngs=nnx.Rngs(0)))
        assert models.parameter_count(model) > 100_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(name="gspn_tt"), "name: expected one of gspn_t, .* got 'gspn_tt'; did you mean gspn_t"),
        (dict(drop_pat=0.1), r"drop_pat: expected an option of .*, got drop_pat=0.1; did you mean drop_path\?"),
        (dict(proxyrank=3), r"proxyrank: .*; did you mean proxy_rank\?"),
        (dict(mixer="attention", proxy_rank=2), "proxy_rank: expected an option of classifier or its mixer"),
        (
            dict(mixer="hyena"),
            "mixer: expected a callable or one of gspn, attention, linfusion, mamba, mamba2; got 'hyena'",
        ),
        (dict(rngs=0), r"rngs: expected a flax.nnx.Rngs, such as nnx.Rngs\(0\), got 0"),
        (dict(num_classes=0), "num_classes: expected an integer of at least 1, got 0"),
        (dict(widths=(0,)), r"widths: expected integers of at least 1, got \(0,\)"),
        (dict(widths=(8.5,)), r"widths: expected integers of at least 1, got \(8.5,\)"),
        (dict(dtype="bf16"), "dtype: expected one of float32, .* got 'bf16'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        gspn_jax.create_model(**{"name": "gspn_nano", "rngs": nnx.Rngs(0), **TINY, **options})


class Scale(nnx.Module):
    """A mixer of someone else: each channel times a parameter."""

    def __init__(self, features: int, *, start: float = 1.0, dtype: Any, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.full(features, start))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale[...][None, None, None]


def test_a_mixer_is_a_name_or_a_callable_and_its_options_go_by_the_same_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(mixers.MIXERS, "scale", Scale)
    for mixer in ("scale", Scale):
        model: Any = gspn_jax.create_model("gspn_nano", rngs=nnx.Rngs(0), mixer=mixer, start=0.5, **TINY)
        np.testing.assert_array_equal(model.stages[0][0].mixer.scale[...], np.full(12, 0.5))
    with pytest.raises(ValueError, match=r"strt: .*; did you mean start\?"):
        gspn_jax.create_model("gspn_nano", rngs=nnx.Rngs(0), mixer=Scale, strt=0.5, **TINY)
    network: Any = nnx.eval_shape(
        lambda: gspn_jax.create_model("dit_s2", num_classes=2, rngs=nnx.Rngs(0), mixer="gspn", width=32, depth=1)
    )
    assert network.blocks.mixer.proxy.out_features == 2  # width / 16


def test_the_mixer_in_a_module_of_someone_else():
    class Foreign(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.mixer = gspn_jax.GSPNMixer(6, proxy_rank=2, rngs=rngs)
            self.attention = gspn_jax.SoftmaxAttention(6, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + self.mixer(x) + self.attention(x)

    model, x = Foreign(nnx.Rngs(1)), jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 7, 6)), jnp.float32)
    with record_choices() as choices:
        y = call(model, x)
    assert y.shape == x.shape and [choice.shape for choice in choices] == [(2, 5, 7, 8)]  # padded to 8 channels
    np.testing.assert_allclose(y, x + call(model.mixer, x) + call(model.attention, x), rtol=1e-5)
    gradient = nnx.jit(nnx.grad(lambda model: jnp.sum(model(x) ** 2)))(model)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, H, W, 6\), got \(2, 5, 7, 5\)"):
        model.mixer(x[..., :5])


def test_features_are_the_input_of_the_head(classifier: Any):
    x = images(2, 8, 12)
    features, maps = nnx.jit(lambda model, x: (model.features(x), model.stage_maps(x)))(classifier, x)
    assert [m.shape for m in maps] == [(2, 8, 12, 8)] and features.shape == (2, 8)
    np.testing.assert_allclose(classifier.norm(maps[-1]).mean((1, 2)), features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(classifier.head(features), call(classifier, x), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_a_classifier_is_exported_with_a_symbolic_batch(classifier: Any):
    graph, state = nnx.split(classifier)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: nnx.merge(graph, state)(x)))(shape)
    restored = jax.export.deserialize(exported.serialize())
    for count in (1, 3):
        x = images(count, 8, 8)
        np.testing.assert_allclose(restored.call(x), call(classifier, x), rtol=1e-4, atol=1e-5)


def test_a_model_is_saved_and_restored_by_orbax(classifier: Any, tmp_path: Any):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(classifier)))
        checkpointer.wait_until_finished()
        other = tiny(seed=7)
        graph, state = nnx.split(other)
        restored = checkpointer.restore(tmp_path / "model", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    x = images(1, 8, 8)
    assert np.abs(np.asarray(call(other, x) - call(classifier, x))).max() > 1e-6
    np.testing.assert_array_equal(call(nnx.merge(graph, state), x), call(classifier, x))


def test_the_package_lists_its_names():
    assert set(gspn_jax.__all__) <= set(dir(gspn_jax)) and gspn_jax.__version__
    with pytest.raises(AttributeError, match="has no attribute 'transformer'"):
        gspn_jax.transformer  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
