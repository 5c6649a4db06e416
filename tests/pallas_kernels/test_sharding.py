"""The operations on meshes of 8 CPU devices: the numbers of one device, and no gather around the scan."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import line_scan, propagate
from tests.pallas_kernels.test_line_scan import draw as draw_scan
from tests.pallas_kernels.test_propagation import draw as draw_maps
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def float64():
    """Sums over devices round differently from sums on one device; in float64 that does not look like an error."""
    with jax.enable_x64(True):
        yield


def mesh_of(data, model):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def scan_loss(x, weights, lam, **options):
    return jnp.sum(jnp.sin(line_scan(x, weights, lam, direction="up", chunk=3, **options)))


def maps_loss(*inputs, **options):
    return jnp.sum(jnp.sin(propagate(*inputs, **options)))


def place(mesh, arrays, divides):
    """Batch over data, last axis over model where it divides; merge whole."""
    batch, channel = divides

    def spec(array):
        if array.ndim == 1:
            return P()
        shared = array.shape[-1] % mesh.shape["model"]
        return P("data" if batch else None, *[None] * (array.ndim - 2), "model" if channel and not shared else None)

    return [jax.device_put(array, NamedSharding(mesh, spec(array))) for array in arrays]


def compiled(function, mesh, arrays):
    gradient = jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(arrays)))))
    with jax.set_mesh(mesh):
        return gradient.lower(*arrays).compile()


MESHES = [((8, 1), 8, 6, 6), ((4, 2), 4, 6, 6), ((2, 4), 2, 8, 8), ((2, 4), 2, 8, 1), ((4, 2), 4, 8, 4)]
QUICK = [("line_scan", (4, 2), 4, 8, 4), ("line_scan", (2, 4), 2, 8, 1)]


@pytest.mark.parametrize("kind,mesh_shape,batch,channels,weight_channels", [
    pytest.param(kind, *sizes, marks=() if (kind, *sizes) in QUICK else pytest.mark.full)
    for kind in ("line_scan", "propagate") for sizes in MESHES
])  # fmt: skip
def test_same_numbers_and_nothing_gathered(kind, mesh_shape, batch, channels, weight_channels):
    draw, loss = (draw_scan, scan_loss) if kind == "line_scan" else (draw_maps, maps_loss)
    arrays = draw((batch, 4, 5, channels), weight_channels)
    mesh = mesh_of(*mesh_shape)
    program = compiled(loss, mesh, placed := place(mesh, arrays, (True, True)))
    value, gradients = program(*placed)
    want_value, want_gradients = jax.value_and_grad(loss, argnums=tuple(range(len(arrays))))(*arrays)
    np.testing.assert_allclose(value, want_value, rtol=1e-12)
    for got, want in zip(gradients, want_gradients, strict=True):
        assert_close(got, want)
    text = str(program.as_text())
    for operation in ("all-gather", "all-to-all", "collective-permute"):
        assert not re.search(rf"\b{operation}\b", text), operation
    # The loss, and the gradients of arrays that several devices hold whole (merge, weights shared by all channels).
    assert re.search(r"\ball-reduce\b", text)


def test_the_gather_check_sees_a_gather():
    mesh = mesh_of(8, 1)
    x = jax.device_put(np.ones((8, 2, 2, 2)), NamedSharding(mesh, P("data")))
    program = compiled(lambda a: jnp.sum(jnp.sin(jnp.cumsum(a, axis=0))), mesh, [x])
    assert re.search(r"\b(all-gather|all-to-all|collective-permute)\b", str(program.as_text()))


@pytest.mark.parametrize("kind,batch,channels,weight_channels,names", [
    ("line_scan", 1, 8, 8, {}), ("line_scan", 4, 8, 2, {}),
    *(pytest.param("line_scan", *sizes, {}, marks=pytest.mark.full) for sizes in ((4, 5, 5), (1, 5, 1))),
    ("line_scan", 4, 8, 8, dict(batch_axis="replica", channel_axis=None)),
    ("line_scan", 4, 8, 8, dict(batch_axis="data", channel_axis="data")),
    *(pytest.param("propagate", *sizes, {}, marks=pytest.mark.full) for sizes in ((1, 5, 1), (4, 8, 2))),
])  # fmt: skip
def test_axes_that_do_not_fit_are_left_out(kind, batch, channels, weight_channels, names):
    draw, loss = (draw_scan, scan_loss) if kind == "line_scan" else (draw_maps, maps_loss)
    arrays = draw((batch, 4, 5, channels), weight_channels)
    mesh = mesh_of(2, 4)
    placed = place(mesh, arrays, (batch % 2 == 0, channels % 4 == 0))
    value, gradients = compiled(functools.partial(loss, **names), mesh, placed)(*placed)
    want_value, want_gradients = jax.value_and_grad(loss, argnums=tuple(range(len(arrays))))(*arrays)
    np.testing.assert_allclose(value, want_value, rtol=1e-12)
    for got, want in zip(gradients, want_gradients, strict=True):
        assert_close(got, want)


@pytest.mark.full
@pytest.mark.parametrize("manual", [("data", "model"), ("data",)])
def test_inside_the_callers_own_shard_map(manual):
    """Every device holds the whole of merge, and of logits that the images share: their gradients are sums."""
    arrays = draw_maps((4, 4, 5, 8), 1)
    arrays[1] = arrays[1][:2]  # logits that do not depend on the batch: the same two on each of the two parts
    mesh = mesh_of(2, 4)
    channel = "model" if "model" in manual else None
    maps = [P("data", None, None, channel), P(), *[P("data", None, None, None, channel)] * 3, P()]

    @functools.partial(jax.shard_map, in_specs=tuple(maps), out_specs=maps[0], axis_names=set(manual))
    def spread(*inputs):
        return propagate(*inputs)

    def loss(*inputs):
        return jnp.sum(jnp.sin(spread(*inputs)))

    def whole(x, logits, *others):
        return maps_loss(x, jnp.concatenate([logits, logits]), *others)

    with jax.set_mesh(mesh):
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(6))))(*arrays)
    want_value, want_gradients = jax.value_and_grad(whole, argnums=tuple(range(6)))(*arrays)
    np.testing.assert_allclose(value, want_value, rtol=1e-12)
    for name, got, want in zip("x logits lam gate skip merge".split(), gradients, want_gradients, strict=True):
        assert_close(got, want, name=name)


def test_explicit_axes_keep_their_sharding():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    arrays = draw_scan((4, 4, 5, 6))
    with jax.set_mesh(mesh):
        placed = place(mesh, arrays, (True, True))
        h = jax.jit(functools.partial(line_scan, direction="left"))(*placed)
    assert_close(h, line_scan(*arrays, direction="left"))
    assert jax.typeof(h).sharding.spec == P("data", None, None, "model")


def test_eager_calls_under_a_mesh():
    arrays = draw_scan((4, 4, 5, 6))
    want = line_scan(*arrays, direction="left")
    with jax.set_mesh(mesh_of(4, 2)):
        assert_close(line_scan(*arrays, direction="left"), want)
        assert_close(jax.vmap(lambda *a: line_scan(*a, direction="left"))(*(a[None] for a in arrays)), want[None])
