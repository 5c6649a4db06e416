"""The kernels behind the public operations: JAX's transformations, meshes, tiles, refused arguments.

Most cases of the interpreter run only in `make test-all`: each compiles kernels for three seconds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import line_scan, line_scan_from_logits, propagate, record_choices
from pallas_kernels.mosaic.tiles import Tile
from tests.pallas_kernels.test_line_scan import draw as draw_scan
from tests.pallas_kernels.test_propagation import draw as draw_maps
from tests.pallas_kernels.test_sharding import place
from tests.tolerances import assert_close

draw = functools.partial(draw_scan, dtype=np.float32)
SHAPE = (2, 3, 5, 8)
NAMES = ("x", "weights", "lam")


def mesh_of(data, model):
    """A mesh of CPU devices, also on a machine with a GPU: the interpreter runs on the CPU."""
    devices = jax.devices("cpu")[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def loss(implementation, *arrays, operation: Any = line_scan, **options):
    options = dict(direction="up", chunk=2) | options
    return jnp.sum(jnp.sin(operation(*arrays, implementation=implementation, **options)))


def gradients(implementation, *arrays, **options):
    return jax.grad(functools.partial(loss, implementation, **options), argnums=(0, 1, 2))(*arrays)


def assert_all_close(got, want, **options):
    for name, one, other in zip(NAMES, got, want, strict=True):
        assert_close(one, other, name=name, **options)


@pytest.mark.parametrize("transform", [
    pytest.param(lambda function: function, id="eager", marks=pytest.mark.full),
    pytest.param(jax.jit, id="jit"),
    pytest.param(lambda function: jax.jit(lambda *arrays: jax.vmap(function)(*(a[None] for a in arrays))),
                 id="vmap in jit", marks=pytest.mark.full),
])  # fmt: skip
def test_gradients_under(transform):
    arrays = draw(SHAPE)
    got = transform(functools.partial(gradients, "mosaic_interpret"))(*arrays)
    assert_all_close([array.reshape(want.shape) for array, want in zip(got, arrays, strict=True)],
                     gradients("xla", *arrays))  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("in_axes", [(0, 0, 0), (None, 0, None), (0, None, 1)], ids=str)
def test_vmap_of_mapped_and_unmapped_operands(in_axes):
    stacks = [np.stack([draw(SHAPE, seed=seed)[k] for seed in range(2)]) for k in range(3)]
    arrays = [stack[0] if axis is None else np.moveaxis(stack, 0, axis)
              for stack, axis in zip(stacks, in_axes, strict=True)]  # fmt: skip

    def run(implementation):
        return jax.vmap(functools.partial(gradients, implementation), in_axes)(*arrays)

    assert_all_close(run("mosaic_interpret"), run("xla"))


@pytest.mark.full
def test_vmap_of_a_folded_map():
    """Three images of one channel become one image of three channels; vmap's axis becomes its batch."""
    stacks = [np.stack([draw((3, 3, 5, 1), seed=seed)[k] for seed in range(2)]) for k in range(3)]
    got, want = (jax.vmap(functools.partial(gradients, name))(*stacks) for name in ("mosaic_interpret", "xla"))
    assert_all_close(got, want)


@pytest.mark.full
def test_checkpoint_and_two_runs_to_the_bit():
    arrays = draw(SHAPE, weight_channels=1, seed=1)
    run = jax.jit(jax.grad(jax.checkpoint(functools.partial(loss, "mosaic_interpret")), argnums=(0, 1, 2)))
    once, again = run(*arrays), run(*arrays)
    assert_all_close(once, gradients("xla", *arrays))
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("weight_channels", [
    pytest.param(16, marks=pytest.mark.full), 1, pytest.param(4, marks=pytest.mark.full),
])  # fmt: skip
def test_on_a_mesh(weight_channels):
    arrays = draw((2, 3, 5, 16), weight_channels, seed=2)
    mesh = mesh_of(2, 2)
    with jax.set_mesh(mesh):
        got = jax.jit(functools.partial(gradients, "mosaic_interpret"))(*place(mesh, arrays, (True, True)))
    assert_all_close(got, gradients("xla", *arrays))


@pytest.mark.full
def test_inside_the_callers_own_shard_map():
    """Every device has the whole of lam: its gradient is a sum over the devices."""
    x, logits, lam = draw((2, 3, 5, 16), seed=3)
    lam = lam[:1]
    mesh = mesh_of(2, 1)

    @functools.partial(jax.shard_map, in_specs=(P("data"), P("data"), P()), out_specs=P("data"))
    def scan(*arrays):
        return line_scan_from_logits(*arrays, direction="up", chunk=2, implementation="mosaic_interpret")

    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(lambda *arrays: jnp.sum(jnp.sin(scan(*arrays))), argnums=(0, 1, 2)))(x, logits, lam)
    *want, of_lam = gradients("xla", x, logits, np.concatenate([lam, lam]), operation=line_scan_from_logits)
    assert_all_close(got, [*want, jnp.sum(of_lam, axis=0, keepdims=True)])


@pytest.mark.full
@pytest.mark.parametrize("skip,chunk,alignment,dtype", [
    (True, None, "aligned", "float32"), (True, 2, "unturned", "float32"),
])  # fmt: skip
def test_propagate(skip, chunk, alignment, dtype):
    size = (4, 4) if alignment == "unturned" else (3, 5)
    arrays = [None if array is None else jnp.asarray(array, dtype)
              for array in draw_maps((1, *size, 8), 8, dtype=np.float32, skip=skip)]  # fmt: skip
    grad_y = jnp.asarray(np.random.default_rng(4).normal(size=(1, *size, 8)), dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *arrays):
        options: Any = dict(chunk=chunk, alignment=alignment, implementation=implementation)
        y, vjp = jax.vjp(functools.partial(propagate, **options), *arrays)
        return y, *vjp(grad_y)

    got, want = run("mosaic_interpret", *arrays), run("xla", *arrays)
    for name, one, other in zip(("y", "x", "logits", "lam", "gate", "skip", "merge"), got, want, strict=True):
        assert (one is None) == (other is None) == (name == "skip" and not skip)
        if one is not None:
            assert_close(one, other, name=name)


@pytest.mark.full
def test_float32_arrays_under_enable_x64():
    arrays = draw((1, 5, 9, 8))
    want = gradients("xla", *arrays)
    with jax.enable_x64(True):
        assert_all_close(gradients("mosaic_interpret", *arrays), want)


@pytest.mark.full
def test_logits_of_any_size():
    logits = np.random.default_rng(5).choice([-100.0, -27.5, -26.0, 0.0, 100.0], (1, 4, 9, 3, 8)).astype(np.float32)
    x, _, lam = draw((1, 4, 9, 8), seed=6)
    got = gradients("mosaic_interpret", x, logits, lam, operation=line_scan_from_logits)
    assert_all_close(got, gradients("xla", x, logits, lam, operation=line_scan_from_logits))
    assert np.all(np.asarray(got[1])[logits < -27] == 0) and np.any(np.asarray(got[1])[logits == -26] != 0)


@pytest.mark.full
@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_logits_that_are_all_alike_mix_evenly(value):
    x, _, lam = draw((1, 4, 9, 8), seed=7)
    logits = np.full((1, 4, 9, 3, 8), value, np.float32)
    h = line_scan_from_logits(x, logits, lam, direction="down", implementation="mosaic_interpret")
    assert_close(h, line_scan_from_logits(x, logits * 0, lam, direction="down", implementation="xla"))


@pytest.mark.full
def test_weights_are_taken_as_they_are():
    x, weights, lam = draw((1, 4, 9, 8), seed=8)
    kernels, reference = (jax.jit(functools.partial(gradients, name)) for name in ("mosaic_interpret", "xla"))
    for scale in (-2.0, 0.0, 1.5):
        weights_of_scale = (weights * scale).astype(np.float32)
        assert_all_close(kernels(x, weights_of_scale, lam), reference(x, weights_of_scale, lam))


@pytest.mark.full
def test_a_tile_only_changes_rounding():
    x, logits, lam = draw((1, 17, 65, 8), seed=9)
    scan = functools.partial(line_scan_from_logits, direction="right", implementation="mosaic_interpret")
    x, logits, lam = (array.swapaxes(1, 2) for array in (x, logits, lam))
    planned = scan(x, logits, lam)
    for tile in (Tile(8, 32, 3), Tile(8, 64, 2, stages=3, stores=1), Tile(16, 128), Tile(8, 64, ghost=16)):
        assert_close(scan(x, logits, lam, tile=tile), planned, name=str(tile))


@pytest.mark.parametrize("tile", [
    Tile(8, 8), Tile(7, 128), Tile(8, 32), Tile(8, 64, warpgroups=5), Tile(8, 64, stages=0), Tile(8, 64, stores=0),
    Tile(8, 512), Tile(8, 64, warpgroups=2, ghost=16), Tile(8, 64, ghost=32), Tile(64, 2), Tile(40, 16),
    Tile(8, 64, stages=1000), Tile(8, -64), Tile(-8, -64), Tile(8, 64, warpgroups=0),
], ids=str)  # fmt: skip
def test_a_tile_that_does_not_fit_is_refused(tile):
    x, logits, lam = draw((1, 70, 3, 8), seed=9)
    for axis in (1, 2):  # a ragged line, whose pixels are consecutive in memory or not
        arrays = (x, logits, lam) if axis == 2 else tuple(array.swapaxes(1, 2) for array in (x, logits, lam))
        direction = "right" if axis == 2 else "down"
        with pytest.raises(ValueError, match="^tile: expected one that fits"):
            line_scan(*arrays, direction=direction, chunk=None, implementation="mosaic_interpret", tile=tile)


def test_float64_has_no_kernel():
    with jax.enable_x64(True):
        arrays = draw_scan(SHAPE)
        with pytest.raises(ValueError, match="'mosaic_interpret' cannot run here: the kernels take .*, not float64"):
            line_scan(*arrays, direction="up", implementation="mosaic_interpret")
        with record_choices() as choices:
            h = line_scan(*arrays, direction="up")
        assert choices[0].implementation == "xla" and "not float64" in choices[0].reason
        np.testing.assert_array_equal(h, line_scan(*arrays, direction="up", implementation="xla"))
