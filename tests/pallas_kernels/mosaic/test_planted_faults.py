"""A test of the tests: a kernel that lacks one step of its synchronisation fails the check of the cases."""

import jax
import pytest

from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.frame import Frame
from tests.pallas_kernels.mosaic import cases, propagation_cases

# Nine lines, two in flight, so that every slot is used again. In TOGETHER two warpgroups read each other's part of the
# state line.
ALONE = cases.ScanCase("right", "none", "none", "bfloat16", "logits", "tall", (1, 8), "one", (2, 1))
TOGETHER = cases.ScanCase("right", "none", "none", "bfloat16", "logits", "wide", (1, 8), "two", (2, 1))


@pytest.fixture(autouse=True)
def traced_afresh():
    """No kernel comes from JAX's caches: neither another test's nor a faulty one."""
    jax.clear_caches()
    yield
    jax.clear_caches()


# Five lines in each of four directions, whose maps are made by one matrix product.
MADE = propagation_cases.PropagationCase("low_rank", "square", (1, 8), None, "none", "bfloat16", 16, True, "planned")
ON_CHIP = MADE._replace(variant="low_rank_on_chip")


# One CTA walks three chunks of three lines.
RESTARTED = ALONE._replace(chunk="divides", dtypes="float32", chunks=3)
WAIT_WORDS = "the interpreter saw a race|Barrier completed phase 1, but no threads observed phase 0"


def nothing(*arguments):
    pass


@pytest.mark.parametrize("missing,case,words", [
    ("commit", ALONE, "the interpreter saw a race"),
    ("meet", TOGETHER, "the interpreter saw a race"),
    ("wait_stored", ALONE, "the interpreter saw a race"),
    ("wait", ALONE, WAIT_WORDS),
])  # fmt: skip
def test_a_missing_step_is_caught(monkeypatch, missing, case, words):
    monkeypatch.setattr(primitives, missing, nothing)
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        cases.check(case, "mosaic_interpret")


@pytest.mark.full
@pytest.mark.parametrize("case", [ALONE, TOGETHER, RESTARTED], ids=str)
def test_the_same_kernel_passes_without_a_fault(case):
    cases.check(case, "mosaic_interpret")


@pytest.mark.parametrize("missing,case,words", [
    pytest.param("commit", MADE, "the interpreter saw a race", marks=pytest.mark.full),
    ("commit", ON_CHIP, "the interpreter saw a race"),
    pytest.param("wait", ON_CHIP, WAIT_WORDS, marks=pytest.mark.full),
])  # fmt: skip
def test_a_missing_step_of_propagation_is_caught(monkeypatch, missing, case, words):
    monkeypatch.setattr(primitives, missing, nothing)
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        propagation_cases.check_inference(case, "mosaic_interpret")


@pytest.mark.parametrize("step,result", [
    ("unless_first", "h"), pytest.param("unless_last", "x", marks=pytest.mark.full),
])  # fmt: skip
def test_a_missing_restart_is_caught(monkeypatch, step, result):
    """Of the scan, and of its gradient, which passes nothing on from one chunk to another."""
    monkeypatch.setattr(Frame, step, lambda self, n, compute, otherwise=None: compute())
    with pytest.raises(AssertionError, match=f"^{result}: RMS ratio"):
        cases.check(RESTARTED, "mosaic_interpret")
