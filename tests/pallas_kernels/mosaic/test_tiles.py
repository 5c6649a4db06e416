"""Plans: every tile that is offered keeps the limits of the card and of a TMA copy, and long lines are served."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import DIRECTIONS, UpProjection
from pallas_kernels.mosaic import card, estimate, layouts, measured, plans, primitives
from pallas_kernels.mosaic.layouts import Kind, Layout, lay_out
from pallas_kernels.mosaic.operations import Kernels
from pallas_kernels.mosaic.plans import candidates, forced, plan
from pallas_kernels.mosaic.tiles import Problem, Tile

H200 = card.H200
# JAX starts each array of shared memory at a multiple, and reserves so much for a sum (CompilerParams).
SCRATCH_ALIGNMENT = 1024
SUM_SCRATCH = 2048


class Operation(NamedTuple):
    """A scan in one direction or in all, or a low-rank propagation in all."""

    shape: tuple[int, int, int, int]
    weight_channels: int
    direction: str | None = None  # None for all
    chunk: int | None = None
    rank: int = 0
    on_chip: bool = False

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS if self.direction is None else (self.direction,)

    def kind(self, kernel: str, dtype: str) -> Kind:
        x = jax.ShapeDtypeStruct(self.shape, dtype)
        if self.rank:
            return layouts.low_rank_kind(kernel, x, self.rank, on_chip=self.on_chip)
        return layouts.scan_kind(kernel, x, x, x)

    def planned(self, kernel: str, dtype: str = "bfloat16") -> Layout:
        with card.assume(H200):
            sizes = self.shape, self.weight_channels, self.directions, self.chunk
            layout = lay_out(self.kind(kernel, dtype), *sizes, interpret=False)
        assert layout is not None
        return layout

    def problem(self, kernel: str, dtype: str = "bfloat16") -> Problem:
        """Of the first launch."""
        return self.planned(kernel, dtype).launches[0][1]

    def trace(self, kernel: str, dtype: str) -> None:
        """Traces the kernels of a forward or backward pass."""
        array: Any = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        x, pixels, channels = array(self.shape), self.shape[:3], self.shape[3]
        count, options = len(self.directions), dict[str, Any](chunk=self.chunk)
        states = array((self.shape[0], count, *self.shape[1:]))
        if self.rank:
            of_maps: Any = functools.partial(jax.ShapeDtypeStruct, dtype="bfloat16")
            up = UpProjection(
                of_maps((self.rank, 4, 3, self.weight_channels)), *[of_maps((self.rank, 4, channels))] * 3
            )
            arrays = [x, of_maps((*pixels, self.rank)), up, of_maps((4,))]
            options["variant"] = "low_rank_on_chip" if self.on_chip else "low_rank"
            options |= dict(keep=True) if kernel == "forward" else {}
            function, more = f"low_rank_{kernel}", [(states,), x]
        else:
            options |= dict(directions=self.directions, from_logits=True)
            arrays = [x, array((*pixels, count, 3, self.weight_channels)), array((*pixels, count, channels))]
            function, more = f"scan_{kernel}", [states, states]
        arrays += more if kernel == "backward" else []
        jax.eval_shape(functools.partial(getattr(Kernels(), function), **options), *arrays)


SCANS = [
    Operation((1, 64, 64, 64), 64), Operation((2, 7, 9, 40), 40, "right", 3), Operation((1, 33, 200, 16), 2, "up"),
    Operation((1, 512, 512, 8), 8, "left"), Operation((1, 1024, 1024, 64), 1), Operation((1, 16, 130, 8), 8, chunk=4),
]  # fmt: skip
LOW_RANK = [
    Operation((1, 64, 64, 64), 64, rank=40), Operation((1, 12, 30, 16), 1, rank=8, chunk=3),
    Operation((1, 200, 300, 32), 32, rank=80),
]  # fmt: skip
ON_CHIP = Operation((1, 12, 12, 16), 16, rank=8, chunk=2, on_chip=True)


@pytest.fixture
def asked(monkeypatch):
    """Bytes of shared memory that launches ask for; nothing of them is traced."""
    asked = []

    def launch(body, inputs, outputs, made, scratch, **options):
        arrays = [s.inner_aval for s in scratch.values() if hasattr(s, "inner_aval")]
        sizes = [math.prod(array.shape) * array.dtype.itemsize for array in arrays]
        barriers = sum(math.prod(s.num_barriers) * 8 for s in scratch.values() if hasattr(s, "num_barriers"))
        asked.append(sum(primitives.round_up(size, SCRATCH_ALIGNMENT) for size in sizes) + barriers)
        return {name: jnp.zeros(array.shape, array.dtype) for name, array in made.items()}

    monkeypatch.setattr(primitives, "launch", launch)
    return asked


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("operation,kernel", [
    *itertools.product([*SCANS, *LOW_RANK], ["forward", "backward"]), (ON_CHIP, "forward"),
])  # fmt: skip
def test_shared_memory_is_not_underestimated(operation, kernel, dtype, asked):
    _, problem, planned = operation.planned(kernel, dtype).launches[0]
    offered = candidates(problem, H200)
    assert planned in offered
    for tile in {planned, *sorted(offered, key=problem.shared_memory)[-5:]}:
        asked.clear()
        with card.assume(H200), forced(lambda other, _, tile=tile: tile if other == problem else None):
            operation.trace(kernel, dtype)
        needed = asked[0] + (SUM_SCRATCH if kernel == "backward" and problem.sharing > 1 else 0)
        assert 0.5 * problem.shared_memory(tile) < needed <= problem.shared_memory(tile) <= H200.shared_memory, tile


def tma_faults(tile: Tile, problem: Problem, itemsize: int) -> list[str]:
    """TMA's rules that copies of the tile break: boxes of at most 256, shared memory at multiples of 128 bytes."""
    margin = max(1, 128 // (tile.channels * itemsize))
    boxes = {"rows": tile.rows, "channels": tile.channels, "rows and margins": tile.rows + 2 * margin}
    starts = {
        "a slot of a ring": tile.rows * tile.channels * itemsize,
        "the pixels that the CTA owns": tile.ghost * tile.channels * itemsize,
        "the margin": margin * tile.channels * itemsize,
    }
    if problem.sharing > 1:
        starts["a slot of shared weights"] = 16 * tile.rows
        starts["own pixels of shared weights"] = 4 * tile.ghost
        starts["one of the shared weights"] = 4 * tile.rows if tile.ghost else 0
    faults = [f"{name}: {size} elements" for name, size in boxes.items() if size > primitives.LARGEST_BOX]
    return faults + [f"{name}: {start} bytes" for name, start in starts.items() if start % primitives.ALIGNMENT]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("operation", [*SCANS, *LOW_RANK])
def test_offered_tiles_keep_the_limits(operation, kernel, dtype):
    problem = operation.problem(kernel, dtype)
    for tile in candidates(problem, H200):
        assert tile.rows * tile.channels % 128 == 0 and tile.channels % 8 == 0, tile
        assert problem.shared_memory(tile) <= H200.shared_memory, tile
        assert problem.registers(tile) * 128 * tile.warpgroups <= 65536, tile
        assert tile.extent >= problem.length or tile.own > tile.ghost > 0, tile
        assert problem.sharing == 1 or problem.sharing % tile.channels == 0, tile
        assert 1 <= tile.chunks <= problem.chunks and (tile.chunks == 1 or not tile.ghost), tile
        assert not tma_faults(tile, problem, jnp.dtype(dtype).itemsize), tile


@pytest.mark.parametrize("weight_channels", [64, 1])
def test_tiles_that_a_caller_gives_are_refused_where_a_copy_would_be_wrong(weight_channels):
    problem = Operation((1, 64, 300, 64), weight_channels, "down").problem("backward")
    for channels, rows, ghost in itertools.product((8, 16, 32, 64), range(8, 257, 8), range(1, 65)):
        tile = Tile(channels, rows, 1, 1, 1, ghost)
        if problem.fits(tile, H200):
            assert not tma_faults(tile, problem, itemsize=2), tile


def test_plans_are_the_same_every_time():
    problem = Operation((1, 200, 200, 64), 64).problem("backward")
    first = plan(problem, H200)
    plans._planned.cache_clear()
    assert plan(problem, H200) == first and first in candidates(problem, H200)
    assert all(tile.warpgroups == 1 for tile in candidates(problem, H200, most_warpgroups=1))


def test_a_plan_is_forced_measured_or_estimated(tmp_path, monkeypatch):
    operation = Operation((1, 200, 200, 64), 64)
    problem, other = operation.problem("forward"), operation.problem("backward")
    estimated, of_other = plan(problem, H200), plan(other, H200)
    known, wanted = Tile(8, 64, 4, 2, 1), Tile(8, 64, 4, 3, 2)
    assert estimated not in (None, known, wanted)
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    measured.add(H200.name, tiles={problem.key: vars(known) | {"milliseconds": 1.0}}, folder=tmp_path)
    plans._planned.cache_clear()
    assert plan(problem, H200) == known and plan(other, H200) == of_other
    assert plan(problem, card.Card("another", (9, 0), 132, H200.shared_memory)) == estimated
    with forced(lambda asked, card: wanted if asked == problem else None):
        assert plan(problem, H200) == wanted and plan(other, H200) == of_other
    assert plan(problem, H200) == known
    plans._planned.cache_clear()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weight_channels", [8, 1])
@pytest.mark.parametrize("length", [512, 1024, 2048, 4096])
def test_long_lines_are_served(length, weight_channels, dtype):
    for kernel in ("forward", "backward"):
        ((_, _, tile),) = Operation((1, length, length, 8), weight_channels).planned(kernel, dtype).launches
        assert tile.extent >= length or tile.ghost, tile


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(16, 1024, 1024, 8), (256, 1024, 1024, 1)])
def test_maps_of_few_channels_fill_the_card(shape, kernel):
    (frame,) = Operation(shape, shape[-1], "down").planned(kernel).frames()
    assert math.prod(frame.grid.values()) >= 100


def test_a_wave_that_is_not_full_takes_its_time():
    """The estimate follows the CTAs in waves: one more than a whole wave costs nearly another."""
    problem = Operation((1, 64, 64, 64), 64).problem("forward")
    tile = Tile(8, 64)
    together = estimate.ctas_of_multiprocessor(problem, tile) * H200.multiprocessors

    def seconds(ctas):
        assert not ctas % (4 * 8)  # directions and channel blocks
        return estimate.seconds(Problem(**vars(problem) | {"batch": ctas // 32}), tile, H200)

    whole = together // 32 * 32
    assert seconds(2 * whole) > 1.5 * seconds(whole)
