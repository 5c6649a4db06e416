import dataclasses
import os
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import tables
from experiments.benchmarks import kernels, options, scans
from experiments.benchmarks.gate import Verdict
from experiments.benchmarks.measurement import DeviceLost, Measurement
from experiments.benchmarks.options import Options
from experiments.benchmarks.scans import CANDIDATES, MOST_VALUES, ScanCase, checked_part, make_cases
from experiments.benchmarks.shapes import SHAPES, KernelShape, select
from tests.tolerances import assert_close

TINY = KernelShape("tiny", 2, 3, 4, 8)
XLA = CANDIDATES["xla"]


def wrong(*inputs, **options):
    return XLA.function(*inputs, **options) * 1.01


WRONG = dataclasses.replace(XLA, name="wrong", implementation="test", function=wrong)


@pytest.fixture
def available(monkeypatch):
    """Lets candidates of implementation "test" run."""
    monkeypatch.setattr("pallas_kernels.implementations", lambda: {"xla": None, "test": None})


def measure(tmp_path, cases, **how):
    with open(tmp_path / "out.csv", "w") as file:
        measurement = Measurement(file, kernels.COLUMNS, clock="host", dry=True, runs=3, seed=0)
        measurement.run(cases, **how)
    return [row for row in measurement.rows if row["shape"]]


def test_dry_run_writes_every_case_and_no_device_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", f"--output={tmp_path}/out.csv", "--seed=1"])
    candidates = ("xla", "flash_attention", "linear_attention")
    chosen = Options(output=str(tmp_path / "out.csv"), shapes=["table1_64_b1_c768"], seed=1, repeats=3)
    kernels.run(chosen, candidates, directions=["right"], dtypes=["bfloat16"], sanitizer=True)
    about, rows = tables.read(tmp_path / "out.csv")
    assert about["kind"].startswith("DRY") and about["seed"] == "1"
    assert about["command"].endswith(" --output=out.csv --seed=1")
    found = {(row["candidate"], row["pass"]): row for row in rows}
    for pass_ in ("forward", "backward", "both"):
        assert found["xla", pass_]["status"] == found["linear_attention", pass_]["status"] == "dry"
        assert found["flash_attention", pass_]["note"] == "cuDNN needs a GPU"
    assert found["xla", "forward"]["bytes"] == str(1 * 9 * 11 * 16 * 6 * 2)
    assert all(row["status"] == "not run" for row in rows if row["pass"] == "memcheck")
    assert not any(row["median_ms"] or row["gb_per_s"] or row["share"] for row in rows)
    assert "No GPU on this machine: a dry run" in capsys.readouterr().out


@pytest.mark.full
def test_a_dry_run_interprets_the_kernels():
    chosen = Options(shapes=["table1_64_b1_c768"], seed=1, correctness_only=True)
    (row,) = kernels.run(chosen, ["mosaic"], directions=["right"], dtypes=["bfloat16"])
    assert (row["candidate"], row["status"], row["checked"]) == ("mosaic_interpret", "right", "whole")


def test_cases_beyond_the_budget_are_named():
    chosen = Options(shapes=["table1"], budget_s=0.0)
    rows = kernels.run(chosen, ["xla"], directions=["down"], dtypes=["float32"])
    left = [row for row in rows if row["status"] == "left out"]
    assert len(left) == 4 * 3 and {row["note"] for row in left} == {"the budget was used up"}


def test_the_sanitizer_checks_kernels_in_a_process_of_its_own(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= $1"\ncase $1 in *race*) exit 9;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    rows = []
    with open(os.devnull, "w") as file:
        measurement = Measurement(file, kernels.COLUMNS, clock="host", dry=True, runs=3, seed=0)
        kernels.sanitize(measurement, ["mosaic", "xla"], ["float32"])
        rows = measurement.rows
    assert [(row["pass"], row["status"]) for row in rows] == [
        ("memcheck", "right"), ("racecheck", "WRONG"), ("synccheck", "right"),
    ]  # fmt: skip
    assert rows[1]["note"] == "exit code 9; --tool=racecheck" and rows[1]["candidate"] == "mosaic"
    with pytest.raises(ValueError, match="1 of 3 rows are wrong or failed, the first: mosaic WRONG exit code 9"):
        options.refuse_faults(rows)


def test_a_wrong_kernel_is_refused_and_not_timed(available, tmp_path):
    cases = make_cases([TINY], [WRONG], directions=["down"], dtypes=["float32"], passes=["forward"])
    gate, row = measure(tmp_path, cases)
    assert (gate["status"], gate["pass"], row["status"]) == ("WRONG", "gate", "refused")
    assert gate["error"] == pytest.approx(0.01, rel=0.01) and row["host_ms"] is None
    assert "is above 1e-06" in row["note"]


@pytest.mark.parametrize("check_part", [0.0, 1.0])
def test_after_a_lost_device_all_cases_are_left_out(available, tmp_path, monkeypatch, check_part):
    def lose(self, error):
        raise DeviceLost("the device is lost")

    def fail(self, program, given):
        raise RuntimeError("illegal address")

    monkeypatch.setattr(Measurement, "_stop_if_lost", lose)
    monkeypatch.setattr(ScanCase, "compare", fail)
    cases = make_cases([TINY], [WRONG], directions=["down"], dtypes=["float32"], passes=["forward", "backward"])
    rows = measure(tmp_path, cases, check_part=check_part)
    assert [row["status"] for row in rows] == ["failed", *["left out"] * (2 if check_part else 1)]
    assert rows[0]["note"] == "RuntimeError: illegal address" and rows[-1]["note"] == "the device is lost"


def verdict_of(function, dtype="float32", shape=TINY) -> Verdict:
    case = ScanCase(dataclasses.replace(WRONG, function=function), shape, "left", None, dtype, "both")
    return case.compare(jax.jit(case.program()), case.draw(jax.random.key(0)))


@pytest.mark.full
def test_gate_sees_each_gradient_and_not_a_number():
    @jax.custom_vjp
    def scan(x, logits, lam):
        return XLA.function(x, logits, lam, direction="left", chunk=None)

    def backward(residuals, gradient, scale):
        pulled = jax.vjp(lambda *inputs: XLA.function(*inputs, direction="left", chunk=None), *residuals)[1](gradient)
        return tuple(g * s for g, s in zip(pulled, scale, strict=True))

    for index, name in enumerate(("x", "weights", "lam")):
        scale = [1.0, 1.0, 1.0]
        scale[index] = 1.001
        scan.defvjp(lambda *inputs: (scan(*inputs), inputs), lambda r, g, scale=tuple(scale): backward(r, g, scale))
        verdict = verdict_of(lambda *inputs, **_: scan(*inputs))
        assert not verdict.passed and verdict.reason.startswith(f"gradient of {name}: RMS ratio 0.001")
    broken = verdict_of(lambda *inputs, **options: XLA.function(*inputs, **options) * jnp.nan)
    assert not broken.passed and "RMS ratio nan" in broken.reason
    assert verdict_of(lambda *inputs, **options: XLA.function(*inputs, **options), "bfloat16").passed


@pytest.mark.full
def test_gate_on_a_part_finds_an_error_in_it(monkeypatch):
    monkeypatch.setattr(scans, "MOST_VALUES", 3 * 4 * 4)
    shape = KernelShape("cut", 3, 3, 4, 8, 4)
    verdict = verdict_of(XLA.function, shape=shape)
    assert verdict.passed and verdict.checked == "last 1 of 3 images, last 4 of 8 channels"
    assert not verdict_of(lambda *a, **o: XLA.function(*a, **o).at[-1, 0, 0, -1].add(1), shape=shape).passed
    assert verdict_of(lambda *a, **o: XLA.function(*a, **o).at[0, 0, 0, 0].add(1), shape=shape).passed


def test_two_runs_that_differ_are_refused():
    case = ScanCase(XLA, TINY, "down", None, "float32", "both")
    right, runs = jax.jit(case.program()), iter((1.0, 1.0 + 2**-20))

    def moving(*given):
        factor = next(runs)
        return jax.tree.map(lambda array: factor * array, right(*given))

    assert case.compare(moving, case.draw(jax.random.key(0))).reason == "two runs on the same inputs differ"


def test_large_maps_are_checked_in_part():
    parts = {shape.name: checked_part(shape) for shape in SHAPES}
    assert parts["gspn2_1024_b16_c8"] == (16, 8) and parts["compact_512_b1_c128"] == (1, 1)
    assert parts["gspn2_1024_b1_c1152"] == (1, 128) and parts["gspn2_1024_b256_c1"] == (128, 1)
    for shape in SHAPES:
        images, groups = parts[shape.name]
        values = images * shape.height * shape.width * groups * shape.channels // shape.weight_channels
        assert 0 < values <= MOST_VALUES


def bytes_moved(candidate, shape, dtype, pass_):
    return ScanCase(CANDIDATES[candidate], shape, "down", None, dtype, pass_).bytes_moved()


def test_bytes_by_hand():
    shape = KernelShape("hand", 2, 3, 5, 8, 4)
    values, weights = 2 * 3 * 5 * 8, 2 * 3 * 5 * 3 * 4
    assert bytes_moved("mosaic", shape, "bfloat16", "forward") == 2 * (3 * values + weights)
    assert bytes_moved("xla", shape, "float32", "backward") == 4 * (6 * values + 2 * weights)
    assert bytes_moved("xla_weights", shape, "bfloat16", "forward") == 2 * 3 * values + 4 * weights
    assert bytes_moved("mosaic_weights", shape, "bfloat16", "both") == 2 * 9 * values + 4 * 3 * weights
    assert bytes_moved("flash_attention", shape, "float16", "both") == 12 * 2 * (2 * 3 * 5 * 64)
    assert bytes_moved("linear_attention", shape, "float16", "backward") == 7 * 2 * (2 * 3 * 5 * 64)
    full = KernelShape("full", 1, 1, 1, 1)
    assert [bytes_moved(name, full, "bfloat16", "forward") for name in ("mosaic", "mosaic_weights")] == [12, 18]
    assert bytes_moved("mosaic", full, "bfloat16", "backward") == 24


@pytest.mark.parametrize("name", ["xla", "xla_weights", "softmax_attention", "linear_attention"])
def test_passes_agree_with_each_other(name):
    cases = make_cases([TINY], [CANDIDATES[name]], directions=["up"], dtypes=["float32"])
    inputs = cases[0].inputs(jax.random.key(0))
    forward, backward, both = (jax.jit(case.program())(*case.arguments(inputs)) for case in cases)
    assert_close(forward, both[0])
    for one, other in zip(backward, both[1], strict=True):
        assert_close(one, other, tolerance=1e-5)


def test_linear_attention_is_attention_by_the_feature_map():
    candidate = CANDIDATES["linear_attention"]
    q, k, v, _ = ScanCase(candidate, TINY, "", None, "float32", "forward").inputs(jax.random.key(0))
    scores = jnp.einsum("bnhd,bmhd->bhnm", jax.nn.elu(q) + 1, jax.nn.elu(k) + 1)
    want = jnp.einsum("bhnm,bmhd->bnhd", scores / jnp.sum(scores, axis=-1, keepdims=True), v)
    assert_close(candidate.function(q, k, v), want, tolerance=1e-5)


def test_attention_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def reason(candidate, shape, dtype="bfloat16", pass_="forward"):
        return ScanCase(CANDIDATES[candidate], shape, "", None, dtype, pass_).reason_against()

    large = SHAPES[0]
    assert reason("flash_attention", TINY, pass_="both") is None
    assert reason("flash_attention", TINY, "float32") == "cuDNN's flash attention takes 16-bit inputs"
    assert reason("flash_attention", large) == "too many tokens: 4.5 Pflop"
    assert reason("softmax_attention", large) == "too many tokens: its scores take 65536 GiB"


def test_order_of_cases():
    shapes = select(["table1", "gspn2_1024_b16_c8"])
    cases = make_cases(shapes, [CANDIDATES["mosaic"], XLA, CANDIDATES["linear_attention"]])
    assert len(cases) == len(set(cases)) == 5 * 2 * 3 * (4 + 4 + 1)
    directions = [case.direction for case in cases if case.direction]
    assert directions == sorted(directions, key=["down", "right", "up", "left"].index)
    assert {case.candidate.name for case in cases[: 5 * 2 * 3]} == {"mosaic"}
