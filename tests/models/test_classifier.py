import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax import models
from gspn_jax.models import create_model, layer_report, list_models, parameter_count
from gspn_jax.models.layers import GlobalResponseNorm, residual
from tests.tolerances import assert_close

TINY = dict(widths=(8, 12), depths=(1, 1), global_stages=(1,), proxy_rank=2, mlp_ratio=2.0)


def tiny(**options):
    """Returns a small network with parameters from NumPy; compiling JAX's generators takes longer than these tests."""
    options = {key: value for key, value in {**TINY, **options}.items() if value is not None}
    abstract = nnx.eval_shape(lambda: create_model("gspn_t", num_classes=5, rngs=nnx.Rngs(0), **options))
    graph, state = nnx.split(abstract)
    rng = np.random.default_rng(0)
    fill = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), state)
    return nnx.merge(graph, fill)


def call(model, *inputs):
    return jax.jit(lambda *args: model(*args))(*inputs)


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, 3)), jnp.float32)


@pytest.mark.parametrize("name,count", [
    ("gspn_t", 31_510_268), ("gspn_s", 50_773_346), ("gspn_b", 93_061_108),
])  # fmt: skip
def test_parameter_counts_of_the_paper(name, count):
    model = nnx.eval_shape(lambda: create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))
    assert parameter_count(model) == count


def test_nano_has_less_than_a_million_parameters():
    model = nnx.eval_shape(lambda: create_model("gspn_nano", num_classes=10, rngs=nnx.Rngs(0)))
    assert parameter_count(model) < 1_000_000


@pytest.mark.parametrize("name,stages", [
    ("gspn_t", [[2, 2], [2, 2], [None] * 7, [None, None]]),
    ("gspn_s", [[2] * 5, [2] * 5, [2] * 10, [None, None]]),
    ("gspn_b", [[2] * 4, [2] * 4, [None] * 7 + [2] * 6 + [None, 2], [None] * 4]),
])  # fmt: skip
def test_local_and_global_blocks_by_the_released_rule(name, stages):
    model = nnx.eval_shape(lambda: create_model(name, num_classes=10, rngs=nnx.Rngs(0)))
    assert [[block.mixer.chunk for block in blocks] for blocks in model.stages] == stages


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "gspn_nano" else pytest.mark.full)
    for name in list_models() if models.PRESETS[name].network == "classifier"
])  # fmt: skip
def test_odd_sizes_and_stage_maps(name):
    model = nnx.eval_shape(lambda: create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))
    image = jax.ShapeDtypeStruct((2, 200, 176, 3), jnp.float32)
    maps = nnx.eval_shape(lambda m, x: m.stage_maps(x), model, image)
    want, height, width = [], 200, 176
    for stage, channels in enumerate(models.PRESETS[name].options["widths"]):
        for _ in range({4: 2, 2: 1}[models.PRESETS[name].options["stem_stride"]] if stage == 0 else 1):
            height, width = -(-height // 2), -(-width // 2)
        want.append((2, height, width, channels))
    assert [m.shape for m in maps] == want
    assert nnx.eval_shape(lambda m, x: m(x), model, image).shape == (2, 1000)


@pytest.mark.full
@pytest.mark.parametrize("mixer,size", [
    ("gspn", (50, 38)), ("gspn", (1, 1)), ("attention", (7, 64)),
])  # fmt: skip
def test_any_size_gives_finite_logits_that_depend_on_every_corner(mixer, size):
    model = tiny(mixer=mixer, **({"proxy_rank": None} if mixer == "attention" else {}))
    x = images(1, *size)
    gradient = jax.jit(jax.grad(lambda array: model(array)[0, 0]))(x)
    corners = np.asarray(gradient)[0][np.ix_((0, -1), (0, -1))]
    assert np.all(np.isfinite(np.asarray(gradient))) and np.all(np.abs(corners).max(axis=-1) > 0)


def test_global_is_global_at_every_resolution():
    """Checks that a pixel changes outputs far beyond the training size: a global block is not a large chunk."""
    block = tiny(widths=(8,), depths=(1,), global_stages=(0,)).stages[0][0].mixer
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 96, 3, 12)), jnp.float32)
    influence = jax.jit(jax.grad(lambda array: jnp.sum(jnp.abs(block(array)[0, -1]))))(x)
    assert float(jnp.abs(influence[0, 0]).max()) > 0


@pytest.mark.full
def test_every_parameter_gets_a_gradient():
    graph, params = nnx.split(tiny())
    loss = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(images(2, 64, 48))))))
    for path, leaf in nnx.to_flat_state(loss(params)):
        assert np.all(np.isfinite(leaf[...])) and np.any(np.asarray(leaf[...]) != 0), path


@pytest.mark.full
def test_rematerialisation_changes_no_number():
    def loss(remat, params):
        graph, _ = nnx.split(tiny(remat=remat, drop_path=0.5))
        return jnp.sum(nnx.merge(graph, params)(images(3, 32, 32), key=jax.random.key(1)) ** 2)

    _, params = nnx.split(tiny())
    plain, again = (jax.jit(jax.value_and_grad(functools.partial(loss, remat)))(params) for remat in (False, True))
    np.testing.assert_allclose(plain[0], again[0], rtol=1e-5)
    for want, got in zip(jax.tree.leaves(plain[1]), jax.tree.leaves(again[1]), strict=True):
        assert_close(got, want, tolerance=2e-5)


@pytest.mark.full
def test_activation_and_alignment_are_arguments():
    x = images(1, 32, 32)
    plain = call(tiny(), x)
    assert float(jnp.abs(call(tiny(activation="silu"), x) - plain).max()) > 1e-3
    assert float(jnp.abs(call(tiny(alignment="unturned"), x) - plain).max()) > 1e-3
    with pytest.raises(ValueError, match="square"):
        tiny(alignment="unturned")(images(1, 32, 64))


@pytest.mark.full
def test_bfloat16_model_keeps_float32_parameters_and_logits():
    model = tiny(dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    x = images(2, 40, 32)
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm asks for the promotion of bfloat16 and float32
        assert nnx.eval_shape(lambda m: m.stage_maps(x), model)[0].dtype == jnp.bfloat16
        assert_close(call(model, x), call(tiny(), x), tolerance=0.05)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    x = jnp.ones((4000, 1, 1, 2))
    y = np.asarray(residual(x, lambda a: 3 * a, 0.25, jax.random.key(0)))
    assert np.all((y == 1) | (y == 5))  # 1 + 3 / 0.75
    assert np.all(y[..., 0] == y[..., 1])
    assert abs((y == 1).mean() - 0.25) < 0.03
    np.testing.assert_array_equal(residual(x, lambda a: 3 * a, 0.25, None), 4 * x)


def test_stochastic_depth_grows_linearly():
    model = nnx.eval_shape(lambda: create_model("gspn_t", num_classes=10, drop_path=0.2, rngs=nnx.Rngs(0)))
    rates = [block.drop_path for blocks in model.stages for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 13))


def test_global_response_norm_agrees_with_its_formula():
    norm = GlobalResponseNorm(4)
    norm.scale[...], norm.bias[...] = jnp.arange(4.0), jnp.arange(4.0) / 10
    x = np.random.default_rng(3).normal(size=(2, 5, 3, 4))
    size = np.sqrt((x**2).sum(axis=(1, 2), keepdims=True))
    want = np.arange(4) * x * size / (size.mean(-1, keepdims=True) + 1e-6) + np.arange(4) / 10 + x
    assert_close(norm(jnp.asarray(x, jnp.float32)), want, dtype="float32")
    assert np.all(np.isfinite(jax.grad(lambda a: jnp.sum(norm(a)))(jnp.zeros((1, 2, 2, 4)))))


def test_layer_report_names_every_layer():
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    small = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    lines = layer_report(nnx.eval_shape(lambda: create_model("gspn_t", num_classes=10, rngs=nnx.Rngs(0))), image)
    assert [line.split(":")[0] for line in lines] == [
        f"stages/{stage}/0 to stages/{stage}/{last}" for stage, last in enumerate((1, 1, 6, 1))
    ]
    assert "propagate_low_rank 56x56x144, chunk 2: xla" in lines[0] and "14x14x576, global" in lines[2]
    assert layer_report(tiny(mixer="attention", proxy_rank=None), small) == ["no propagation layer"]
    assert "56x56x144" not in layer_report(tiny(alignment="unturned"), small)[0]


@pytest.mark.parametrize("options,words", [
    (dict(name="gspn_x"), ("name", "gspn_t", "'gspn_x'")), (dict(mixer="hyena"), ("mixer", "attention", "'hyena'")),
    (dict(proxyrank=3), ("proxyrank", "proxy_rank", "3")), (dict(stem_stride=3), ("stem_stride", "1, 2, 4", "3")),
    (dict(activation="relu"), ("activation", "silu", "'relu'")), (dict(drop_path=1.0), ("drop_path", "1.0")),
    (dict(widths=("a",)), ("widths", "integers", "'a'")),
    (dict(depths=(1, 1)), ("depths", "4 widths", "2")), (dict(global_stages=(4,)), ("global_stages", "0..3", "(4,)")),
])  # fmt: skip
def test_bad_arguments(options, words):
    with pytest.raises(ValueError) as error:
        create_model(**{"name": "gspn_t", "num_classes": 2, "rngs": nnx.Rngs(0), **options})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_images():
    for shape in ((2, 3, 32, 32), (0, 32, 32, 3), (2, 0, 32, 3)):
        with pytest.raises(ValueError) as error:
            tiny()(jnp.zeros(shape))
        assert str(error.value) == f"images: expected shape (B, H, W, 3), every axis at least 1, got {shape}"
