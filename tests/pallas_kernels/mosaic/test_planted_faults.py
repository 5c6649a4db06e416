"""A test of the tests: kernels that lack one step of their synchronisation do not pass the check of the cases."""

import jax
import pytest

from pallas_kernels.mosaic import primitives
from tests.pallas_kernels.mosaic import cases, propagation_cases

# Nine lines, two in flight: every slot is used again. Two warpgroups read each other's part of the state line.
ALONE = cases.ScanCase("right", "none", "none", "bfloat16", "logits", "tall", (1, 8), "one", (2, 1))
TOGETHER = cases.ScanCase("right", "none", "none", "bfloat16", "logits", "wide", (1, 8), "two", (2, 1))


@pytest.fixture(autouse=True)
def traced_afresh():
    """Neither a kernel of another test nor a faulty one is taken out of a cache."""
    jax.clear_caches()
    yield
    jax.clear_caches()


# Seven lines, a product for each where one direction is walked; one for all where all four are.
MADE = propagation_cases.PropagationCase("low_rank", "square", (1, 8), None, "none", "bfloat16", 16, True, "planned")
ON_CHIP = MADE._replace(variant="low_rank_on_chip")


def nothing(*arguments):
    pass


@pytest.mark.parametrize("missing,case,words", [
    ("commit", ALONE, "the interpreter saw a race"),
    ("meet", TOGETHER, "the interpreter saw a race"),
    ("wait_stored", ALONE, "the interpreter saw a race"),
    ("wait", ALONE, "the interpreter saw a race|Barrier completed phase 1, but no threads observed phase 0"),
])  # fmt: skip
def test_a_missing_step_is_caught(monkeypatch, missing, case, words):
    with monkeypatch.context() as patched:
        patched.setattr(primitives, missing, nothing)
        with pytest.raises(jax.errors.JaxRuntimeError, match=words):
            cases.check(case, "mosaic_interpret")
    jax.clear_caches()
    cases.check(case, "mosaic_interpret")  # nothing of the fault is left


@pytest.mark.parametrize("missing,case,words", [
    ("commit", MADE, "the interpreter saw a race"),
    ("commit", ON_CHIP, "the interpreter saw a race"),
    ("wait", ON_CHIP, "the interpreter saw a race|Barrier completed phase 1, but no threads observed phase 0"),
])  # fmt: skip
def test_a_missing_step_of_propagation_is_caught(monkeypatch, missing, case, words):
    monkeypatch.setattr(primitives, missing, nothing)
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        propagation_cases.check_inference(case, "mosaic_interpret")
