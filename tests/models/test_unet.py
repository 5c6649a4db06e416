from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.models import UNET_SIZES, UNet, layer_report, parameter_count, unet_mixer
from gspn_jax.models.conditioning import timestep_features

TINY: dict[str, Any] = dict(widths=(8, 16), depths=(0, 2), num_heads=2, context_width=6, blocks=1, norm_groups=4)
SDXL_LIKE: dict[str, Any] = dict(text_width=5, id_features=4)


def tiny(mixer="attention", mixer_options=None, **options):
    """A small network with random parameters, none of them zero."""
    chosen: Any = {**TINY, **options}
    build = lambda: UNet(**chosen, mixer=unet_mixer(mixer, mixer_options), rngs=nnx.Rngs(0))  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), state))


def inputs(height, width, dtype: Any = np.float32, *, is_sdxl=False) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = dict(latents=(2, height, width, 4), context=(2, 3, 6))
    shapes |= dict(text_embeds=(2, 5), time_ids=(2, 6)) if is_sdxl else {}
    arrays = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return {**arrays, "timestep": jnp.asarray([3.0, 700.0], dtype)}


@jax.jit(static_argnums=0)
def apply(graph, state, inputs):
    return nnx.merge(graph, state)(**inputs)


# The published networks have 49,574,080 and 409,683,200 parameters in self-attention; here others are in its place.
@pytest.mark.parametrize("kind,mixer,options,parameters", [
    pytest.param("sd15", "gspn", {}, 809_946_884 + 51_122_944, marks=pytest.mark.full),
    pytest.param("sd15", "gspn", {"query_key_value": True}, 809_946_884 + 59_254_144, marks=pytest.mark.full),
    pytest.param("sdxl", "gspn", {}, 2_157_780_484 + 422_483_480, marks=pytest.mark.full),
    pytest.param("sdxl", "gspn", {"query_key_value": True}, 2_157_780_484 + 489_683_480, marks=pytest.mark.full),
    pytest.param("sd15", "linfusion", {}, 809_946_884 + 99_235_520, marks=pytest.mark.full),
])  # fmt: skip
def test_parameters_of_the_published_networks(kind, mixer, options, parameters):
    unet = nnx.eval_shape(lambda: UNet(**UNET_SIZES[kind], mixer=unet_mixer(mixer, options), rngs=nnx.Rngs(0)))
    assert parameter_count(unet) == parameters


@pytest.mark.full
@pytest.mark.parametrize("height,width", [(5, 7), (1, 1)])
def test_any_size_depends_on_every_corner(height, width):
    unet, given = tiny(), inputs(height, width)
    graph, state = nnx.split(unet)
    out = apply(graph, state, given)
    assert out.shape == (2, height, width, 4) and out.dtype == jnp.float32 and np.all(np.isfinite(out))
    for row in (0, -1):
        for column in (0, -1):
            other = apply(graph, state, given | {"latents": given["latents"].at[:, row, column].add(1)})
            assert np.abs(np.asarray(other - out)).max(axis=(0, 3)).min() > 0


def test_skips_and_odd_sizes_by_hand():
    graph, state = nnx.split(tiny())
    given = inputs(5, 7)

    @jax.jit
    def by_hand(state):
        unet = nnx.merge(graph, state)
        condition, context = jax.nn.silu(unet._embedding(given["timestep"], None, None)), given["context"]

        def run(stage, *maps):
            return stage(jnp.concatenate(maps, axis=-1), condition, context, keep_mixed=False)[0]

        start = unet.start(given["latents"])
        fine = run(unet.down[0].stages[0], start)
        halved = unet.down[0].resample(fine)  # (2, 3, 4, 8)
        coarse = run(unet.down[1].stages[0], halved)
        x = unet.middle_block(run(unet.middle, coarse), condition)
        x = run(unet.up[0].stages[1], run(unet.up[0].stages[0], x, coarse), halved)
        rows, columns = np.arange(5) * 3 // 5, np.arange(7) * 4 // 7  # the nearest pixel
        x = unet.up[0].resample(x[:, rows][:, :, columns])
        x = run(unet.up[1].stages[1], run(unet.up[1].stages[0], x, fine), start)
        return unet.end(jax.nn.silu(unet.norm(x)))

    np.testing.assert_allclose(apply(graph, state, given), by_hand(state), rtol=1e-4, atol=1e-4)


def test_condition_by_hand():
    """Timestep features in float64, time ids after the pooled text (SDXL), both embeddings summed."""
    unet, given = tiny(**SDXL_LIKE, depths=(0, 0)), inputs(4, 4, is_sdxl=True)

    def features(values, count):
        angles = np.asarray(values, np.float64)[..., None] * 10_000.0 ** -(np.arange(count) / count)
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)

    def embedding(module, x):
        first, second = ((np.asarray(layer.kernel, np.float64), np.asarray(layer.bias, np.float64))
                         for layer in (module.first, module.second))  # fmt: skip
        y = x @ first[0] + first[1]
        return y / (1 + np.exp(-y)) @ second[0] + second[1]

    np.testing.assert_allclose(timestep_features(given["timestep"], 4), features(given["timestep"], 4), atol=1e-4)
    ids = features(given["time_ids"], 2).reshape(2, -1)
    want = embedding(unet.time, features(given["timestep"], 4))
    want += embedding(unet.added, np.concatenate([np.asarray(given["text_embeds"]), ids], axis=1))
    got = unet._embedding(given["timestep"], given["text_embeds"], given["time_ids"])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_gradients_by_finite_differences():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        unet, given = tiny(dtype=jnp.float64, param_dtype=jnp.float64), inputs(3, 4, np.float64)
        graph, state = nnx.split(unet)
        loss = jax.jit(lambda state, given: jnp.sum(jnp.sin(nnx.merge(graph, state)(**given))))
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, given)
        rng = np.random.default_rng(3)
        step = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), (state, given))
        moved = [jax.tree.map(lambda a, b, e=e: a + e * b, (state, given), step) for e in (1e-6, -1e-6)]
        want = (loss(*moved[0]) - loss(*moved[1])) / 2e-6
        got = sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (gradient, step)), strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("mixer", ["attention", "gspn"])
def test_remat_changes_no_gradient(mixer):
    given = inputs(4, 4, is_sdxl=True)

    def gradient(remat):
        graph, state = nnx.split(tiny(mixer, **SDXL_LIKE, remat=remat))
        return jax.jit(jax.grad(lambda state: jnp.sum(jnp.sin(nnx.merge(graph, state)(**given)))))(state)

    for one, other in zip(*(jax.tree.leaves(gradient(remat)) for remat in (False, True)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert np.any(np.asarray(one) != 0)


def test_layers_have_names_and_mixers_outputs_an_order():
    unet, given = tiny("gspn"), inputs(4, 8)
    report = layer_report(unet, *(given[name] for name in ("latents", "timestep", "context")))
    assert report and all("chunk 4" in line for line in report)
    assert report[0].startswith("down/1/0") and report[-1].split(":")[0].endswith("up/0/1")
    _, mixed = nnx.eval_shape(lambda unet: unet(**given, keep_mixed=True), unet)
    assert [each.shape for each in mixed] == [(2, 2, 2, 4, 16)] * 3 + [(1, 2, 2, 4, 16)]
    assert [each.depth for each in unet.transformers] == [2, 2, 2, 1]


@pytest.mark.parametrize("options,words", [
    (dict(depths=(1,)), r"depths: expected 2 numbers of at least 0, one for each width, got \(1,\)"),
    (dict(num_heads=(2, 2, 2)), "num_heads: expected one number or 2"),
    (dict(num_heads=3), "num_heads: expected a divisor of features = 16, got 3"),
    (dict(norm_groups=3), r"norm_groups: expected a divisor of the widths \(8, 16\), got 3"),
    (dict(text_width=5), "id_features: expected an even number with text_width, None without, got None"),
    (dict(blocks=0), "blocks: expected an integer of at least 1, got 0"),
])  # fmt: skip
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)


def test_bad_inputs_are_refused():
    unet, given = tiny(**SDXL_LIKE), inputs(4, 4, is_sdxl=True)
    cases: list[tuple[str, Any, str]] = [
        ("latents", jnp.zeros((2, 4, 4, 3)), r"latents: expected shape \(B, H, W, 4\), got \(2, 4, 4, 3\)"),
        ("latents", jnp.zeros((2, 0, 4, 4)), "latents: expected shape"),
        ("timestep", jnp.zeros(()), r"timestep: expected shape \(2,\)"),
        ("context", jnp.zeros((2, 3, 5)), r"context: expected shape \(2, T, 6\), got \(2, 3, 5\)"),
        ("text_embeds", None, r"text_embeds: expected shape \(2, 5\), got None"),
        ("time_ids", jnp.zeros((2, 5)), r"time_ids: expected shape \(2, 6\), got \(2, 5\)"),
    ]
    for name, array, words in cases:
        with pytest.raises(ValueError, match=words):
            unet(**(given | {name: array}))
    with pytest.raises(ValueError, match="text_embeds: expected none, since the network takes none, got"):
        tiny()(**given)
    with pytest.raises(ValueError, match="rank: expected an option of the mixer gspn"):
        unet_mixer("gspn", {"rank": 2})
