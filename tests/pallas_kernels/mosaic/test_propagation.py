"""The fused propagation kernels, interpreted with race detection and compiled for an H200, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import deviceless
from pallas_kernels import propagate
from pallas_kernels.mosaic import forms
from pallas_kernels.mosaic.tiles import Tile, plan
from tests.pallas_kernels.mosaic.test_compiled import assert_sound
from tests.pallas_kernels.test_propagation import draw
from tests.tolerances import assert_close

NAMES = ("y", "x", "logits", "lam", "gate", "skip", "merge")


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    weight_channels: int
    chunk: int | None
    dtype: str
    skip: bool
    tile: Tile

    def arrays(self) -> list[jax.Array | None]:
        drawn = draw(self.shape, self.weight_channels, seed=11, dtype=np.float32, skip=self.skip)
        return [None if array is None else jnp.asarray(array, self.dtype) for array in drawn]


CASES = [
    Case((2, 4, 9, 16), 1, 3, "bfloat16", True, Tile(8, 16, 1, 3, 1)),  # shared weights, a chunk that does not divide
    Case((1, 17, 18, 8), 8, 2, "float16", False, Tile(8, 16, 2, 2, 2)),  # two warpgroups
    Case((1, 18, 50, 9), 3, None, "float32", True, Tile(8, 48, 1, 2, 1, ghost=8)),  # two segments, three launches
]


@pytest.fixture
def planned(monkeypatch):
    """Makes the directions that the tile of a case serves take it."""

    def use(tile: Tile) -> None:
        monkeypatch.setattr(forms, "plan", lambda work, *rest: tile if work.fits(tile, rest[0]) else plan(work, *rest))

    return use


def run(case: Case, implementation: str, *arrays):
    """y and all gradients."""
    operation = functools.partial(propagate, chunk=case.chunk, implementation=implementation)
    grad_y = jnp.asarray(np.random.default_rng(12).normal(size=case.shape), case.dtype)
    y, vjp = jax.vjp(operation, *arrays)
    return y, *vjp(grad_y)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case.shape)))
def test_interpreted(case, planned):
    planned(case.tile)
    arrays = case.arrays()
    got = jax.jit(functools.partial(run, case, "mosaic_interpret"))(*arrays)
    want = jax.jit(functools.partial(run, case, "xla"))(*arrays)
    for name, one, other in zip(NAMES, got, want, strict=True):
        assert (one is None) == (other is None) == (name == "skip" and not case.skip)
        if other is not None:
            assert_close(one, other, name=name)


@pytest.mark.skipif(bool(deviceless.missing()), reason=str(deviceless.missing()))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case.shape)))
def test_compiled(case, planned):
    planned(case.tile)
    compilation = deviceless.compile_for_h200(functools.partial(run, case, "mosaic"), *case.arrays())
    counts = {"propagation_forward": 4, "propagation_backward": 4}
    assert deviceless.kernel_counts(compilation.compiled) == counts
    for kernel in compilation.kernels:
        assert_sound(kernel)


def test_a_state_of_ones_stays_one_in_every_direction(planned):
    """Rows sum to exactly 1 also where the kernel normalises: h = 1 from the first line on, in bfloat16 logits."""
    planned(Tile(8, 16, 1, 2, 2))
    logits = np.random.default_rng(13).normal(0, 3, (1, 12, 12, 4, 3, 8))
    lam = np.zeros((1, 12, 12, 4, 8))
    lam[:, :, 0, 0] = lam[:, 0, :, 1] = lam[:, :, -1, 2] = lam[:, -1, :, 3] = 1  # the line where each direction starts
    x = jnp.ones((1, 12, 12, 8), jnp.float32)
    arrays = jnp.asarray(logits, jnp.bfloat16), jnp.asarray(lam, jnp.float32)
    y = propagate(x, *arrays, jnp.ones((1, 12, 12, 4, 8)), None, jnp.ones(4), implementation="mosaic_interpret")
    assert np.all(np.asarray(y) == 4)
