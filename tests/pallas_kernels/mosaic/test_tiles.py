"""Plans: every tile that is offered keeps the limits of the card and of a TMA copy, and long lines are served."""

import functools
import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.mosaic import card, line_scan, primitives, tiles
from pallas_kernels.mosaic.forms import Form
from pallas_kernels.mosaic.pipeline import Pipeline
from pallas_kernels.mosaic.tiles import Tile

H200 = card.H200
# JAX starts each array of shared memory at a multiple, and reserves so much for a sum (CompilerParams).
SCRATCH_ALIGNMENT = 1024
SUM_SCRATCH = 2048


def arguments(kernel, shape, weight_channels, dtype):
    """x, logits, and the arrays that a kernel reads and writes besides the logits."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    logits = jax.ShapeDtypeStruct((*shape[:3], 3, weight_channels), dtype)
    return (x, logits, (x, x), (x,)) if kernel == "forward" else (x, logits, (x, x, x, x), (x, x))


def planned(kernel, shape, weight_channels, dtype="bfloat16", direction="down", chunk=None) -> Form:
    with card.assume(H200):
        return Form(kernel, *arguments(kernel, shape, weight_channels, dtype), direction, chunk, None, False)


# (batch, height, width, channels), weight channels, direction, chunk.
SHAPES = [
    ((1, 64, 64, 64), 64, "down", None), ((2, 7, 9, 40), 40, "right", 3), ((1, 33, 200, 16), 2, "up", None),
    ((1, 512, 512, 8), 8, "left", None), ((1, 1024, 1024, 64), 1, "down", None), ((1, 16, 130, 8), 8, "down", 4),
]  # fmt: skip


@pytest.fixture
def scratch(monkeypatch):
    """Bytes of shared memory that a kernel asks for with a tile; nothing of it is traced."""
    asked = []

    def launch(body, inputs, outputs, made, scratch, **options):
        arrays = [s.inner_aval for s in scratch if hasattr(s, "inner_aval")]
        sizes = [math.prod(array.shape) * array.dtype.itemsize for array in arrays]
        barriers = sum(math.prod(s.num_barriers) * 8 for s in scratch if hasattr(s, "num_barriers"))
        asked.append(sum(primitives.round_up(size, SCRATCH_ALIGNMENT) for size in sizes) + barriers)
        return tuple(jnp.zeros(array.shape, array.dtype) for array in made)

    monkeypatch.setattr(primitives, "launch", launch)

    def bytes_of(kernel, form: Form, tile: Tile, shape, weight_channels, dtype, direction, chunk):
        x, logits, *_ = arguments(kernel, shape, weight_channels, dtype)
        x, weights = jax.eval_shape(form.map, x), jax.eval_shape(form.weights, logits)
        function = line_scan.scan_forward if kernel == "forward" else line_scan.scan_backward
        maps = (x, weights, x) if kernel == "forward" else (x, weights, x, x, x)
        options = dict(direction=direction, chunk=chunk, from_logits=True, tile=tile)
        jax.eval_shape(functools.partial(function, **options), *maps)
        return asked.pop() + (SUM_SCRATCH if kernel == "backward" and form.is_shared else 0)

    return bytes_of


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("shape,weight_channels,direction,chunk", SHAPES)
def test_shared_memory_is_not_underestimated(kernel, shape, weight_channels, direction, chunk, dtype, scratch):
    form = planned(kernel, shape, weight_channels, dtype, direction, chunk)
    offered = tiles.candidates(form.work, H200)
    assert form.tile in offered
    for tile in {form.tile, *sorted(offered, key=form.work.shared_memory)[-10:]}:
        asked = scratch(kernel, form, tile, shape, weight_channels, dtype, direction, chunk)
        assert asked <= form.work.shared_memory(tile) <= H200.shared_memory, (tile, asked)


def tma_faults(tile: Tile, form: Form, itemsize: int) -> list[str]:
    """TMA's rules that copies of the tile break: boxes of at most 256, shared memory at multiples of 128 bytes."""
    margin = max(1, 128 // (tile.channels * itemsize))
    boxes = {"rows": tile.rows, "channels": tile.channels, "rows and margins": tile.rows + 2 * margin}
    starts = {
        "a slot of a ring": tile.rows * tile.channels * itemsize,
        "the pixels that the CTA owns": tile.ghost * tile.channels * itemsize,
        "the margin": margin * tile.channels * itemsize,
    }
    if form.is_shared:
        starts["a slot of shared weights"] = 16 * tile.rows
        starts["own pixels of shared weights"] = 4 * tile.ghost
        starts["one of the shared weights"] = 4 * tile.rows if tile.ghost else 0
    faults = [f"{name}: {size} elements" for name, size in boxes.items() if size > primitives.LARGEST_BOX]
    return faults + [f"{name}: {start} bytes" for name, start in starts.items() if start % primitives.ALIGNMENT]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("shape,weight_channels,direction,chunk", SHAPES)
def test_offered_tiles_keep_the_limits(kernel, shape, weight_channels, direction, chunk, dtype):
    form = planned(kernel, shape, weight_channels, dtype, direction, chunk)
    for tile in tiles.candidates(form.work, H200):
        assert tile.rows * tile.channels % 128 == 0 and tile.channels % 8 == 0, tile
        assert form.work.shared_memory(tile) <= H200.shared_memory, tile
        assert form.work.registers(tile) * 128 * tile.warpgroups <= 65536, tile
        assert tile.extent >= form.length or tile.own > tile.ghost > 0, tile
        assert not form.is_shared or form.work.sharing % tile.channels == 0, tile
        assert not tma_faults(tile, form, jnp.dtype(dtype).itemsize), tile


@pytest.mark.parametrize("shape,weight_channels", [((1, 64, 300, 64), 64), ((1, 64, 300, 64), 1)])
def test_tiles_that_a_caller_gives_are_refused_where_a_copy_would_be_wrong(shape, weight_channels):
    form = planned("backward", shape, weight_channels)
    for channels, rows, ghost in itertools.product((8, 16, 32, 64), range(8, 257, 8), range(1, 65)):
        tile = Tile(channels, rows, 1, 1, 1, ghost)
        if form.work.fits(tile, H200):
            assert not tma_faults(tile, form, itemsize=2), tile


def test_plans_are_the_same_every_time():
    work = planned("backward", (1, 200, 200, 64), 64).work
    first = tiles.plan(work, H200)
    tiles.plan.cache_clear()
    assert tiles.plan(work, H200) == first and first in tiles.candidates(work, H200)
    assert all(tile.warpgroups == 1 for tile in tiles.candidates(work, H200, most_warpgroups=1))


def test_what_was_measured_comes_first(tmp_path, monkeypatch):
    work = planned("forward", (1, 200, 200, 64), 64).work
    other = planned("backward", (1, 200, 200, 64), 64).work
    estimated, of_other = tiles.plan(work, H200), tiles.plan(other, H200)
    measured = dict[str, Any](channels=8, rows=64, warpgroups=4, stages=2, stores=1, ghost=0)
    assert Tile(**measured) != estimated
    table = tmp_path / "measured.json"
    table.write_text(json.dumps({H200.name: {work.key: measured}}))
    monkeypatch.setattr(tiles, "MEASURED", table)
    cached = tiles._measured, tiles.plan
    for function in cached:
        function.cache_clear()
    try:
        assert tiles.plan(work, H200) == Tile(**measured)
        assert tiles.plan(other, H200) == of_other
        assert tiles.plan(work, card.Card("another", (9, 0), 132, H200.shared_memory)) == estimated
    finally:
        monkeypatch.undo()
        for function in cached:
            function.cache_clear()
    assert tiles.plan(work, H200) == estimated


def test_the_table_of_measured_tiles_is_sound():
    for name, table in tiles._measured().items():
        for key, tile in table.items():
            work = tiles.ScanWork.of_key(key)
            assert work.key == key and work.fits(Tile(**tile), H200), (name, key, tile)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["down", "right"])
@pytest.mark.parametrize("weight_channels", [8, 1])
@pytest.mark.parametrize("length", [512, 1024, 2048, 4096])
def test_long_lines_are_served(length, weight_channels, direction, dtype):
    for kernel in ("forward", "backward"):
        form = planned(kernel, (1, length, length, 8), weight_channels, dtype, direction)
        assert form.tile.extent >= length or form.tile.ghost, form.tile


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(16, 1024, 1024, 8), (256, 1024, 1024, 1)])
def test_maps_of_few_channels_fill_the_card(shape, kernel):
    form = planned(kernel, shape, shape[-1])
    work = form.work
    walk = Pipeline((work.batch, work.lines, work.length, work.channels), "down", None, form.tile, reverse=False)
    assert math.prod(walk.grid.values()) >= 100
