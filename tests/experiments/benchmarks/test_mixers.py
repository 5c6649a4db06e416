import dataclasses

import jax
import pytest

from experiments import tables
from experiments.benchmarks import mixers
from experiments.benchmarks.measurement import Measurement
from experiments.benchmarks.mixers import CANDIDATES, COLUMNS, MixerCase, checked_part
from experiments.benchmarks.options import Options
from experiments.benchmarks.shapes import CROSSOVER, LAYERS, KernelShape, select_layers
from tests.tolerances import assert_close

TINY = KernelShape("tiny", 2, 3, 4, 8, rank=4)
XLA = MixerCase("xla", TINY, "both")


@pytest.fixture(autouse=True)
def usual_promotion():
    """A 16-bit proxy's gradient is summed in float32, which strict promotion takes for a mistake."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.full
def test_dry_run_writes_every_case_and_no_device_time(tmp_path, capsys):
    candidates = ("flash_attention", "xla", "linear_attention")
    options = Options(output=str(tmp_path / "out.csv"), seed=1, repeats=3)
    assert len(mixers.run(options, candidates, ["forward"])) == 2 + 3
    about, rows = tables.read(tmp_path / "out.csv")
    assert about["kind"].startswith("DRY") and about["seed"] == "1" and about["commit"]
    found = {row["candidate"]: row for row in rows if row["pass"] == "forward"}
    assert found["xla"]["status"] == found["linear_attention"]["status"] == "dry"
    assert found["flash_attention"]["note"] == "cuDNN needs a GPU"
    assert not any(row["median_ms"] or row["gb_per_s"] or row["share"] for row in rows)
    assert found["xla"]["tokens"] == "12" and float(found["xla"]["compiled_mib"]) >= 0
    assert "No GPU on this machine: a dry run" in capsys.readouterr().out


@pytest.mark.full
def test_interpreted_kernels_pass_the_gate():
    (row,) = mixers.run(Options(correctness_only=True), ["low_rank_on_chip"], ["forward"])
    assert (row["shape"], row["status"], row["checked"]) == ("width1152_16", "right", "forward, whole")


@pytest.mark.full
def test_the_other_mixers_run_and_name_their_form():
    rows = mixers.run(Options(seed=1, repeats=2), tuple(mixers.OTHERS), ["both"])[-3:]
    assert [(row["candidate"], row["status"]) for row in rows] == [(name, "dry") for name in mixers.OTHERS]
    assert all(row["note"] == mixers.OTHERS[row["candidate"]] for row in rows)


@pytest.mark.full
def test_gate_sees_each_gradient_and_errors_in_its_part(monkeypatch):
    monkeypatch.setattr(mixers, "MOST_VALUES", 3 * 4 * 4)
    assert checked_part(TINY) == (1, 4)
    given, right = XLA.draw(jax.random.key(0)), jax.jit(mixers.reference(TINY, TINY.channels, "both"))

    def verdict(change):
        return XLA.compare(lambda *inputs: change(*right(*inputs)), given)

    passed = verdict(lambda y, gradients: (y, gradients))
    assert passed.passed and passed.checked == "both, last 1 of 2 images, last 4 of 8 channels"
    assert verdict(lambda y, gradients: (y.at[0].add(1), gradients)).passed
    assert verdict(lambda y, gradients: (y.at[-1, 0, 0, -1].add(1), gradients)).reason.startswith("y: RMS ratio")
    wrong = verdict(lambda y, gradients: (y, (gradients[0], 1.05 * gradients[1])))
    assert wrong.reason.startswith("gradient of x: RMS ratio 0.0") and not wrong.passed
    for index, name in enumerate(("gate", "lam", "logits", "merge", "proxy", "skip")):

        def change(y, gradients, index=index):
            leaves, tree = jax.tree.flatten(gradients[0])
            leaves[index] = 1.05 * leaves[index]
            return y, (tree.unflatten(leaves), gradients[1])

        assert verdict(change).reason.startswith(f"gradient of {name}")


def test_the_reference_is_the_mixer_without_kernels():
    given = XLA.draw(jax.random.key(0))[:2]
    want = jax.jit(mixers.reference(TINY, TINY.channels, "forward"))(*given)
    assert_close(jax.jit(dataclasses.replace(XLA, pass_="forward").program())(*given), want)


def test_a_wrong_mixer_is_refused_and_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(MixerCase, "is_reference", lambda self: False)
    monkeypatch.setattr(MixerCase, "program", lambda self: lambda parameters, x: 1.1 * x)
    with open(tmp_path / "out.csv", "w") as file:
        measurement = Measurement(file, COLUMNS, clock="host", dry=True, runs=3, seed=0)
        measurement.time(dataclasses.replace(XLA, pass_="forward"))
    assert [row["status"] for row in measurement.rows] == ["WRONG", "refused"]
    assert "is above 0.004" in measurement.rows[1]["note"]


def test_bytes_by_hand():
    pixels, parameters = 2 * 3 * 4, 8 * 4 + 4 * 8 * (12 + 3 * 4) + 4
    forward = dataclasses.replace(XLA, pass_="forward")
    assert forward.bytes_moved() == 2 * (2 * pixels * 8 + parameters)
    assert XLA.bytes_moved() == 2 * (5 * pixels * 8 + 3 * parameters)
    linear = dataclasses.replace(forward, candidate="linear_attention")
    assert linear.bytes_moved() == 2 * (16 * pixels + 8 * 64 * 4)


def test_what_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr("pallas_kernels.implementations", lambda: {"mosaic": None, "xla": None})
    (large,) = select_layers(["sdxl_16k_level1"])

    def reason(candidate, shape, pass_="both"):
        return MixerCase(candidate, shape, pass_).reason_against() or ""

    assert reason("scans", large) == reason("gspn", large) == reason("low_rank_on_chip", TINY) == ""
    assert "variant: expected one that fits" in reason("low_rank_on_chip", large)
    assert "its scores take" in reason("softmax_attention", large, "forward")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert reason("flash_attention", large, "forward") == ""
    assert "Pflop" in reason("flash_attention", large)


def test_shapes_reach_over_the_crossover_with_attention():
    batches = {640: 2, 1152: 32, 1280: 2}
    shapes = [shape for shape in (*LAYERS, *CROSSOVER) if batches.get(shape.channels) == shape.batch]
    sides = {(shape.channels, shape.height) for shape in shapes if shape.height == shape.width}
    assert sides >= {(width, side) for width in batches for side in (8, 16, 32, 64, 128)}
    assert all(shape.rank for shape in shapes) and len(set(CANDIDATES)) == len(CANDIDATES)
    with pytest.raises(ValueError, match="maps of layers, which have a proxy; got gspn2_1024"):
        select_layers(["gspn2"])
