"""The propagation kernels, interpreted with race detection and compiled for an H200, against the reference."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UpProjection, propagate, propagate_low_rank
from pallas_kernels.mosaic import compile_only
from pallas_kernels.up_projection import maps_of
from tests.pallas_kernels.mosaic import cases, propagation_cases
from tests.pallas_kernels.mosaic.propagation_cases import AXES, IN_TURN, SIZES, TILES, check, covering, product
from tests.pallas_kernels.mosaic.test_compiled import assert_sound
from tests.tolerances import TOLERANCES, rms_ratio

RANDOM = 100  # cases drawn from the product; TEST_SEED=1 draws others


def low_rank(case: propagation_cases.PropagationCase) -> str | None:
    """The variant of a case whose kernels make the maps, forward and backward."""
    return case.variant if propagation_cases.backward_variant(case) == "low_rank" else None


@pytest.mark.parametrize("case", cases.marked(covering(), quick=low_rank))
def test_interpreted(case, planned):
    planned(TILES[case.tile])
    check(case, "mosaic_interpret")


@pytest.mark.parametrize("case", cases.marked(propagation_cases.inference(), quick=propagation_cases.on_chip_variant))
def test_inference_interpreted(case, planned):
    planned(TILES[case.tile])
    propagation_cases.check_inference(case, "mosaic_interpret")


@pytest.mark.full
@pytest.mark.parametrize("tile", IN_TURN)
def test_products_and_lines_in_turn_interpreted(tile, planned):
    like = (case for case in covering() if (case.variant, case.tile) == ("low_rank", tile.removesuffix(" in turn")))
    planned(IN_TURN[tile])
    check(next(like)._replace(tile=tile), "mosaic_interpret")


@pytest.mark.random
@pytest.mark.parametrize("number", range(RANDOM))
def test_product_of_all_cases(number, planned):
    order = np.random.default_rng(int(os.environ.get("TEST_SEED", "0"))).permutation(len(product()))
    case = product()[order[number]]
    print(case)
    planned(TILES[case.tile])
    check(case, "mosaic_interpret")


def test_covering_cases_cover_every_allowed_pair_and_are_few():
    chosen = covering()
    assert len(chosen) <= 40 and len(set(chosen)) == len(chosen)
    assert set(np.unique(cases.pairs(chosen, AXES))) == set(np.unique(cases.pairs(product(), AXES)))


@pytest.mark.full
@pytest.mark.skipif(bool(compile_only.missing()), reason=str(compile_only.missing()))
@pytest.mark.parametrize("case", propagation_cases.compiled(), ids=str)
def test_compiled(case, planned):
    planned(TILES[case.tile])
    run = lambda *arrays: propagation_cases.y_and_gradients(case, "mosaic", *arrays)  # noqa: E731
    compilation = compile_only.compile_for_h200(run, *case.arrays())
    height, width = SIZES[case.size]
    launches = 1 if height == width else 2  # a launch walks all directions of a square map, or those of an axis
    family = "low_rank" if case.variant.startswith("low_rank") else "scan"
    forward = {"low_rank_on_chip": 1} if case.is_on_chip else {f"{family}_forward": launches}
    if not case.is_long:  # where launches hand their state on, there are more of them
        counts = compile_only.kernel_counts(compilation.compiled)
        assert counts == forward | {f"{family}_backward": launches}
    for kernel in compilation.kernels:
        assert_sound(kernel)
        products = sum(n for opcode, n in kernel.opcodes.items() if opcode.startswith("HGMMA"))
        assert (products > 0) == (family == "low_rank"), kernel.opcodes


@pytest.mark.full
def test_a_chunk_that_is_not_finite_spoils_no_other(planned):
    """Also where one CTA walks several chunks."""
    planned(TILES["chunks"])
    rng = np.random.default_rng(15)
    x = rng.normal(size=(1, 4, 4, 8))
    x[0, 0, 0, 0] = np.nan
    maps = rng.normal(size=(1, 4, 4, 4, 3, 8)), *rng.normal(size=(3, 1, 4, 4, 4, 8))
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, *maps, np.ones(4))]
    y = propagate(*arrays, chunk=2, implementation="mosaic_interpret")
    want = propagate(*arrays, chunk=2, implementation="xla")
    assert np.isnan(want).sum() == 4
    np.testing.assert_array_equal(np.isnan(y), np.isnan(want))


@pytest.mark.full
def test_shares_of_four_directions_are_rounded_within_the_tolerance():
    """Each direction's share of y is rounded to x's dtype: in bfloat16 this adds about 2e-3, in float32 nothing."""
    case = propagation_cases.PropagationCase("low_rank", "square", (1, 8), None, "none", "bfloat16", 3, True, "planned")
    x, proxy, up, merge, _ = case.arrays()
    exact = propagate(x.astype(jnp.float32), *maps_of(proxy, up), merge, implementation="xla")
    errors = {}
    for dtype in ("bfloat16", "float32"):
        y = propagate_low_rank(x.astype(dtype), proxy, up, merge, implementation="mosaic_interpret", variant="low_rank")
        errors[dtype] = rms_ratio(y, exact)
    assert 1e-3 < errors["bfloat16"] < TOLERANCES["bfloat16"] and errors["float32"] < 1e-5, errors


@pytest.mark.full
def test_a_state_of_ones_stays_one_in_every_direction():
    """Rows that the kernel normalises sum to exactly 1, also from bfloat16 logits: h is 1 from the first line on."""
    logits = np.random.default_rng(13).normal(0, 3, (1, 12, 12, 4, 3, 8))
    lam = np.zeros((1, 12, 12, 4, 8))
    lam[:, :, 0, 0] = lam[:, 0, :, 1] = lam[:, :, -1, 2] = lam[:, -1, :, 3] = 1  # the line where each direction starts
    x = jnp.ones((1, 12, 12, 8), jnp.float32)
    arrays = jnp.asarray(logits, jnp.bfloat16), jnp.asarray(lam, jnp.float32), jnp.ones((1, 12, 12, 4, 8)), None
    y = propagate(x, *arrays, jnp.ones(4), implementation="mosaic_interpret")
    assert np.all(np.asarray(y) == 4)


@pytest.mark.parametrize("variant", [pytest.param("low_rank", marks=pytest.mark.full), "low_rank_on_chip"])
def test_a_state_of_ones_stays_one_where_tensor_cores_make_the_maps(variant):
    """As above. Five channels of the proxy mark the lines where directions start; the others give the logits."""
    rng = np.random.default_rng(14)
    proxy = rng.normal(0, 3, (1, 12, 12, 16))
    proxy[..., :5] = [0, 0, 0, 0, 1]
    proxy[:, :, 0, 0] = proxy[:, 0, :, 1] = proxy[:, :, -1, 2] = proxy[:, -1, :, 3] = 1
    up = [np.zeros((16, 4, 3, 8)), np.zeros((16, 4, 8)), np.zeros((16, 4, 8))]
    up[0][5:] = rng.normal(size=up[0][5:].shape)
    for d in range(4):
        up[1][d, d] = up[2][4, d] = 1
    logits, lam, gate = (jnp.asarray(array, jnp.bfloat16) for array in up)
    up = UpProjection(logits, lam, gate, None)
    inputs = jnp.ones((1, 12, 12, 8), jnp.float32), jnp.asarray(proxy, jnp.bfloat16), up, jnp.ones(4)
    y = propagate_low_rank(*inputs, implementation="mosaic_interpret", variant=variant)
    assert np.all(np.asarray(y) == 4)
