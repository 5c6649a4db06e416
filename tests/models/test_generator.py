import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.mixers import GSPNMixer
from gspn_jax.models import PRESETS, create_model, layer_report, layers, parameter_count
from gspn_jax.models.conditioning import AdaptiveHead, timestep_features
from gspn_jax.models.generator import Block, Generator
from gspn_jax.models.stack import stacked
from tests.tolerances import assert_close

WIDTH, CLASSES = 12, 5
TINY = dict(width=WIDTH, depth=2, proxy_rank=2, global_blocks=())
# In-blocks 0 and 1, middle block 2, out-blocks 3 and 4. These global blocks split both scans into two runs.
GLOBAL_BLOCKS = (1, 3)


class Scale(nnx.Module):
    """A mixer that compiles fast: it multiplies each channel by a factor, and by twice that if it is global."""

    def __init__(self, features, *, chunk, dtype, rngs):
        self.chunk, self.scale = chunk, nnx.Param(jnp.ones(features))

    def __call__(self, x):
        return x * self.scale[...][None, None, None] * (2 if self.chunk is None else 1)


def tiny(**options):
    """Returns a small network whose parameters come from NumPy; none is zero."""
    options = {key: value for key, value in {**TINY, **options}.items() if value is not None}
    return random_parameters(functools.partial(create_model, "gspn_s2", num_classes=CLASSES, **options))


def random_parameters(build):
    graph, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    fill = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), state)
    return nnx.merge(graph, fill)


def inputs(batch, height, width, channels=4):
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.normal(size=(batch, height, width, channels)), jnp.float32)
    return latents, jnp.asarray(rng.integers(0, 1000, batch)), jnp.asarray(rng.integers(0, CLASSES + 1, batch))


def call(model, *arrays):
    return jax.jit(lambda *args: model(*args))(*arrays)


def abstract(name="gspn_s2", **options):
    return nnx.eval_shape(lambda: create_model(name, num_classes=1000, rngs=nnx.Rngs(0), **options))


def chunks(model):
    """Returns the chunks of all blocks, in order of execution."""
    found = []
    for blocks, runs in ((model.in_blocks, model.in_runs), (None, ()), (model.out_blocks, model.out_runs)):
        if blocks is None:
            found.append(model.mid_block.mixer.chunk)
        for graph, length in runs:
            found += [nnx.merge(graph, nnx.state(blocks)).mixer.chunk] * length
    return found


@pytest.mark.parametrize("name,count", [
    ("gspn_b2", 144_016_356), ("gspn_l2", 465_230_660), ("gspn_xl2", 723_513_260),
])  # fmt: skip
def test_parameter_counts_of_the_paper(name, count):
    assert parameter_count(abstract(name)) == count


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.network == "generator"])
def test_presets(name):
    model, depth, width = abstract(name), PRESETS[name].options["depth"], PRESETS[name].options["width"]
    assert chunks(model) == [2] * (depth - 1) + [None, None]
    assert nnx.state(model)["mid_block"]["mixer"]["proxy"]["kernel"].shape == (width, width // 16)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((3, 40, 32, 4), "bfloat16"), ((3,), "int32"))]
    out = nnx.eval_shape(lambda module, x, n: module(x, n, n), model, *arrays)
    assert out.shape == (3, 40, 32, 8) and out.dtype == jnp.float32


def unrolled(mixer, model, latents, timestep, label, key=None):
    """Computes the network by a loop over blocks, each built separately with its slice of the parameters."""
    condition = model.conditioning(timestep, label)
    residual = model.embed(layers.patches(latents, model.patch)) + condition[:, None, None]
    hidden, skips, half = jnp.zeros_like(residual), [], model.depth // 2
    keys = [None] * (model.depth + 2) if key is None else jax.random.split(key, model.depth + 2)

    def dropped(hidden, index):
        """Returns the output of block `index` - 1 after stochastic depth."""
        if key is None or index == 0:
            return hidden
        return layers.drop_path(hidden, model.drop_path * (index - 1) / model.depth, keys[index])

    for index in range(model.depth + 1):
        chunk, after = None if index in GLOBAL_BLOCKS else 2, index - half - 1
        build = functools.partial(Block, WIDTH, mixer=mixer, chunk=chunk, long_skip=after >= 0)
        graph = nnx.graphdef(nnx.eval_shape(lambda build=build: build(dtype=jnp.float32, rngs=nnx.Rngs(0))))
        stack, place = (model.in_blocks, index) if index < half else (model.out_blocks, after)
        state = jax.tree.map(lambda leaf, place=place: leaf[place], nnx.state(stack))
        block = model.mid_block if index == half else nnx.merge(graph, state)
        if after >= 0:
            hidden = block.long_skip(jnp.concatenate([hidden, skips.pop()], axis=-1))
        residual = residual + dropped(hidden, index)
        hidden = block.depthwise(block.project(block.norm(residual)))
        hidden = block.forward_depthwise(block.forward_in(block.mixer(hidden)))
        hidden = block.forward_out(jnp.maximum(hidden, 0) ** 2)
        if index < half:
            skips.append(hidden)
    residual = residual + dropped(hidden, model.depth + 1)
    return layers.unpatched(model.head(model.norm(residual), condition), model.patch)


@pytest.mark.full
def test_scans_cut_in_the_middle_equal_a_loop_over_blocks():
    """Compares values and all gradients in training, with rematerialisation and stochastic depth."""
    build = functools.partial(Generator, CLASSES, WIDTH, 4, mixer=Scale, global_blocks=GLOBAL_BLOCKS)
    graph, params = nnx.split(random_parameters(functools.partial(build, remat=True, drop_path=0.5)))
    arrays, key = inputs(3, 10, 6), jax.random.key(3)

    def loss(forward, params):
        out = forward(nnx.merge(graph, params), *arrays, key=key)
        return jnp.sum(jnp.sin(out)), out

    scanned, looped = (
        functools.partial(loss, forward) for forward in (Generator.__call__, functools.partial(unrolled, Scale))
    )
    (_, got), got_gradient = jax.jit(jax.value_and_grad(scanned, has_aux=True))(params)
    (_, want), want_gradient = jax.jit(jax.value_and_grad(looped, has_aux=True))(params)
    assert_close(got, want, tolerance=2e-6)
    want_leaves = dict(nnx.to_flat_state(want_gradient))
    for path, leaf in nnx.to_flat_state(got_gradient):
        assert np.any(np.asarray(leaf[...]) != 0), path
        assert_close(leaf[...], want_leaves[path][...], tolerance=2e-5, name=str(path))


@pytest.mark.full
def test_inference_drops_nothing():
    model, arrays = tiny(depth=4, global_blocks=GLOBAL_BLOCKS, drop_path=0.5), inputs(3, 10, 6)
    loop = functools.partial(unrolled, functools.partial(GSPNMixer, proxy_rank=2), model)
    assert_close(call(model, *arrays), jax.jit(loop)(*arrays), tolerance=2e-6)


def test_parameters_do_not_depend_on_where_the_scan_is_cut():
    def shapes(model):
        return {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}

    cut = abstract(global_blocks=(3, 20))
    assert shapes(cut) == shapes(abstract(global_blocks=())) == shapes(abstract(global_blocks=range(25)))
    assert [index for index, chunk in enumerate(chunks(cut)) if chunk is None] == [3, 20]
    assert shapes(cut)["in_blocks", "norm", "scale"] == (12, 368)


@pytest.mark.full
def test_the_program_does_not_grow_with_depth():
    def lines(depth):
        graph, params = nnx.split(abstract(depth=depth, drop_path=0.1))
        arrays = inputs(1, 8, 8)

        def loss(params):
            return jnp.sum(nnx.merge(graph, params)(*arrays, key=jax.random.key(0)))

        return len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines())

    assert lines(24) < 1.05 * lines(8)


def test_layer_report_names_where_the_scan_is_cut():
    model = nnx.eval_shape(lambda: create_model("gspn_xl2", num_classes=10, rngs=nnx.Rngs(0)))
    numbers = jax.ShapeDtypeStruct((2,), jnp.int32)
    lines = layer_report(model, jax.ShapeDtypeStruct((2, 32, 64, 4), jnp.float32), numbers, numbers)
    assert [line.split(": xla")[0] for line in lines] == [
        "in_blocks 0 to 27 to out_blocks 0 to 25: propagate_low_rank 16x32x1504, chunk 2",
        "out_blocks 26 to 27: propagate_low_rank 16x32x1504, global",
    ]


@pytest.mark.full
def test_every_parameter_gets_a_gradient():
    graph, params = nnx.split(tiny())
    arrays = inputs(2, 4, 6)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(*arrays)))))(params)
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.all(np.isfinite(leaf[...])) and np.any(np.asarray(leaf[...]) != 0), path


@pytest.mark.full
@pytest.mark.parametrize("options,size", [
    (dict(), (12, 26)), (dict(), (2, 2)), (dict(mixer="attention", proxy_rank=None, patch=1), (3, 5)),
])  # fmt: skip
def test_any_size_depends_on_every_corner(options, size):
    model = tiny(**options)
    latents, timestep, label = inputs(1, *size)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(model(x, timestep, label)[0, 0])))(latents)
    corners = np.asarray(gradient)[0][np.ix_((0, -1), (0, -1))]
    assert np.all(np.isfinite(np.asarray(gradient))) and np.all(np.abs(corners).max(axis=-1) > 0)


def test_timestep_and_label_condition_every_image_by_itself():
    model = tiny()
    latents, timestep, label = inputs(4, 4, 4)
    latents = jnp.broadcast_to(latents[:1], latents.shape)
    timestep, label = jnp.asarray([5, 5, 700, 5]), jnp.asarray([1, CLASSES, 1, 1])
    forward = jax.jit(lambda *args: model(*args))
    out = np.asarray(forward(latents, timestep, label))
    np.testing.assert_allclose(out[0], out[3], atol=1e-6)
    assert min(np.abs(out[0] - out[1]).max(), np.abs(out[0] - out[2]).max()) > 1e-3
    assert np.all(np.isnan(forward(latents, timestep, label + 1)[1]))  # one more than "no class"


def test_timestep_features():
    timestep = np.array([0, 17, 801.5])
    angles = timestep[:, None] * 10_000 ** (-np.arange(128) / 128)
    want = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(timestep_features(jnp.asarray(timestep, jnp.float32)), want, atol=2e-4)


def test_patches_and_back():
    maps = jnp.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
    tokens = layers.patches(maps, 2)
    assert tokens.shape == (2, 3, 2, 12)
    np.testing.assert_array_equal(tokens[1, 2, 0], maps[1, 4:6, 0:2].ravel())
    np.testing.assert_array_equal(layers.unpatched(tokens, 2), maps)


@pytest.mark.full
def test_bfloat16_model_keeps_float32_parameters_and_outputs():
    model, arrays = tiny(dtype="bfloat16"), inputs(2, 8, 12)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm asks for the promotion of bfloat16 and float32
        assert_close(call(model, *arrays), call(tiny(), *arrays), tolerance=0.05)


def test_a_fresh_network_predicts_zero():
    head = AdaptiveHead(4, 6, rngs=nnx.Rngs(0))
    assert not np.any(head(jnp.ones((2, 3, 5, 4)), jnp.ones((2, 4))))


def test_stacked_blocks_start_apart_and_within_their_bounds():
    block = functools.partial(Block, 4, mixer=Scale, chunk=None, long_skip=False)
    blocks = stacked(functools.partial(block, dtype=jnp.float32), 2, nnx.Rngs(0))
    for linear, bound in ((blocks.project, math.sqrt(6 / 8)), (blocks.forward_in, math.sqrt(1 / 4))):
        kernel = np.asarray(linear.kernel[...])
        assert kernel.shape == (2, 4, 4) and 0.7 * bound < np.abs(kernel).max() <= bound
        assert np.abs(kernel[0] - kernel[1]).max() > 0.1 * bound


@pytest.mark.parametrize("options,words", [
    (dict(name="gspn_9"), ("name", "gspn_xl4", "'gspn_9'")), (dict(mixer="hyena"), ("mixer", "attention", "'hyena'")),
    (dict(widths=3), ("widths", "width", "3")), (dict(depth=5), ("depth", "even", "5")),
    (dict(depth=0), ("depth", "at least 1", "0")), (dict(global_blocks=(25,)), ("global_blocks", "0..24", "(25,)")),
    (dict(global_blocks=(-1,)), ("global_blocks", "0..24", "(-1,)")), (dict(patch=0), ("patch", "1", "0")),
    (dict(width=0), ("width", "1", "0")), (dict(drop_path=1.0), ("drop_path", "1.0")),
    (dict(num_classes=0), ("num_classes", "1", "0")), (dict(in_channels=0), ("in_channels", "1", "0")),
])  # fmt: skip
def test_bad_arguments(options, words):
    with pytest.raises(ValueError) as error:
        create_model(**{"name": "gspn_s2", "num_classes": 2, "rngs": nnx.Rngs(0), **options})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("shapes,words", [
    (((2, 7, 8, 4), (2,), (2,)), ("latents", "(B, H, W, 4)", "patch = 2", "(2, 7, 8, 4)")),
    (((2, 8, 9, 4), (2,), (2,)), ("latents", "(2, 8, 9, 4)")),
    (((2, 8, 8, 3), (2,), (2,)), ("latents", "(2, 8, 8, 3)")),
    (((8, 8, 4), (2,), (2,)), ("latents", "(8, 8, 4)")), (((2, 8, 8, 4), (3,), (2,)), ("timestep", "(2,)", "(3,)")),
    (((2, 8, 8, 4), (2,), (2, 1)), ("label", "(2,)", "(2, 1)")),
])  # fmt: skip
def test_bad_inputs(shapes, words):
    with pytest.raises(ValueError) as error:
        tiny()(*(jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, (float, int, int), strict=True)))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_labels_are_integers_and_unturned_maps_square():
    latents, timestep, label = inputs(1, 4, 8)
    with pytest.raises(ValueError, match="label: expected integers, got float32"):
        tiny()(latents, timestep, label.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"label: expected 0\.\.\d+ \(\d+: no class\), got 99"):
        tiny()(latents, timestep, label + 99 - label)
    with pytest.raises(ValueError, match=r"latents: expected .* got \(0, 4, 8, 4\)"):
        tiny()(latents[:0], timestep[:0], label[:0])
    with pytest.raises(ValueError, match="square"):
        tiny(alignment="unturned")(latents, timestep, label)
