"""The loop: what it continues, refuses, reports and stops at."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gspn_jax.training import NonFinite, OptimizerOptions, TrainOptions, train
from gspn_jax.training.checkpoints import Checkpoints, load_parameters, save_parameters
from gspn_jax.training.metrics import EVENTS, Clock, Means, Metrics, duration, read_rows
from gspn_jax.training.transfer import fit
from tests.training.toy import BATCH, ToyBatches, digest, toy_task, toy_train


def rows(workdir: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(workdir) if row["kind"] == kind]


def test_a_run_reports_and_can_be_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = toy_train(str(tmp_path), num_steps=6, evaluate_steps=3, log_steps=2, checkpoint_steps=3)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "devices: 8 x cpu (cpu); processes: 1" and out[1] == "mesh: data 1, model 8; fsdp off"
    assert out[2] == "parameters: 1,766" and any(line.startswith("step 2/6  ") for line in out)
    assert "images/s" in "".join(out) and "ETA" in "".join(out)
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 6]
    assert [row["step"] for row in rows(tmp_path, "evaluation")] == [3, 6]
    assert rows(tmp_path, "train")[-1]["replaced"] == 6  # a count, summed over the run
    assert list((tmp_path / EVENTS).iterdir())
    assert json.loads((tmp_path / "config.json").read_text()) == {"config": {"seed": 0}}
    again = toy_train(str(tmp_path), num_steps=6, evaluate_steps=3, log_steps=2, checkpoint_steps=3)
    assert again.evaluation == result.evaluation and digest(again.state) == digest(result.state)
    assert [row["step"] for row in rows(tmp_path, "evaluation")] == [3, 6]  # nothing twice


@pytest.mark.full
def test_the_numbers_depend_on_the_seed(tmp_path: Path):
    curves = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(curves))
        toy_train(str(folder), num_steps=3, seed=seed, checkpoint_steps=0)
        curves.append([row["loss"] for row in rows(folder, "train")])
    assert curves[0] == curves[1] and curves[0] != curves[2]


def test_learning_lowers_the_loss_and_the_average_differs(tmp_path: Path):
    result = toy_train(str(tmp_path), num_steps=60, mixing=False, learning_rate=0.6, log_steps=10)
    losses = [row["loss"] for row in rows(tmp_path, "train")]
    assert losses[-1] < 0.5 * losses[0] and result.evaluation["top1"] > 80
    assert result.evaluation["ema_loss"] != result.evaluation["loss"]


def test_another_configuration_is_refused_by_name(tmp_path: Path):
    toy_train(str(tmp_path), num_steps=2, config={"seed": 0, "free": {"x": 1}})
    with pytest.raises(ValueError, match=r"holds another run; .*: seed \(was 0, is 1\)$"):
        toy_train(str(tmp_path), num_steps=2, config={"seed": 1, "free": {"x": 2}})
    toy_train(str(tmp_path), num_steps=2, config={"seed": 0, "free": {"x": 2}})


def test_nan_stops_and_names_step_and_checkpoint(tmp_path: Path):
    with pytest.raises(NonFinite, match=r"loss is nan at step 8; the last good checkpoint is step 5 .*checkpoints/5"):
        toy_train(str(tmp_path), num_steps=12, batches={"nan_at": 7})
    assert Checkpoints(tmp_path, read_only=True).steps() == [5]
    assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2, 3, 4, 5, 6, 7]


def test_nan_at_the_step_of_a_checkpoint_is_not_saved(tmp_path: Path):
    with pytest.raises(NonFinite, match="at step 10; the last good checkpoint is step 5"):
        toy_train(str(tmp_path), num_steps=12, batches={"nan_at": 9})
    assert Checkpoints(tmp_path, read_only=True).steps() == [5]


def test_nan_before_any_checkpoint(tmp_path: Path):
    with pytest.raises(NonFinite, match="at step 1; there is no checkpoint yet"):
        toy_train(str(tmp_path), num_steps=12, batches={"nan_at": 0})


@pytest.mark.full
def test_profile_trace_is_written(tmp_path: Path):
    toy_train(str(tmp_path), num_steps=5, checkpoint_steps=0, profile_steps=(2, 4))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 0}, "num_steps: expected an integer >= 1, got 0"),
        ({"num_steps": 2.5}, "num_steps: expected an integer >= 1, got 2.5"),
        ({"workdir": ""}, "workdir: expected the name of a folder, got ''"),
        ({"log_steps": -1}, "log_steps: expected an integer >= 0, got -1"),
        ({"keep": 0}, "keep"),
        ({"profile_steps": (5, 5)}, "profile_steps: expected first < end"),
        ({"profile_steps": (5, 50)}, "profile_steps"),
    ],
)
def test_bad_options_are_named(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        TrainOptions(**{"workdir": "x", "num_steps": 10, "batch_size": 4} | change)


def test_batch_that_does_not_divide_is_refused_before_anything_starts(tmp_path: Path):
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 24"):
        toy_train(str(tmp_path / "run"), accumulate=3, mesh={"data": 8})
    assert not (tmp_path / "run").exists()


def test_implicit_transfers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gspn_jax.training.loop.place_batch", lambda batch, mesh: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        toy_train(str(tmp_path), num_steps=2)


def test_start_from_other_parameters_with_another_head(tmp_path: Path):
    toy_train(str(tmp_path / "first"), num_steps=2)
    source, description = load_parameters(tmp_path / "first")
    target = jax.eval_shape(toy_task(num_classes=9).init, jax.random.key(0))
    transfer = fit(source, target)
    assert description["ema"] and set(transfer.loaded) == {"layers/0/kernel", "layers/0/bias"}
    report = "\n".join(transfer.report())
    assert "starts fresh: head/kernel (32, 9) (the source has (32, 6))" in report and "loaded 2 arrays" in report
    assert fit({**source, "old": np.zeros(3)}, target).unused == ("old (3,)",)
    with pytest.raises(ValueError, match="none that fits"):
        fit({"other": np.zeros(3)}, target)


def test_initial_parameters_are_where_the_run_starts(tmp_path: Path):
    values = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), toy_task().init(jax.random.key(0)))
    options = TrainOptions(str(tmp_path), num_steps=1, batch_size=BATCH)
    tiny = OptimizerOptions(learning_rate=0.0, warmup_learning_rate=0.0, min_learning_rate=0.0)
    result = train(
        toy_task(),
        ToyBatches(),
        options=options,
        optimizer=tiny,
        initial=lambda shapes: {"layers/0/kernel": values["layers"]["0"]["kernel"]},
    )
    for params in (result.state.params, result.state.ema):
        assert params is not None
        np.testing.assert_allclose(params["layers"]["0"]["kernel"], 0.5, rtol=1e-6)
        assert abs(np.asarray(params["head"]["kernel"]).mean()) < 0.2


def test_converted_parameters_are_no_run(tmp_path: Path):
    save_parameters(tmp_path, toy_task().init(jax.random.key(0)), {})
    with pytest.raises(ValueError, match="holds parameters without a run to continue"):
        toy_train(str(tmp_path), num_steps=2)


def test_means_and_clock_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    means = Means()
    means.add({"loss": 2.0}, {"replaced": 1})
    means.add({"loss": 4.0}, {"replaced": 2})
    other = Means()
    other.restore(json.loads(json.dumps(means.state())))
    assert other.take() == means.take() == {"loss": 3.0, "replaced": 3}
    means.add({"loss": 5.0}, {"replaced": 0})
    assert means.take() == {"loss": 5.0, "replaced": 3}
    now = iter([10.0, 16.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(images_per_step=8)
    for _ in range(4):
        clock.tick()
    clock.pause(2.0)
    assert clock.take() == pytest.approx(3 * 8 / 4.0)
    monkeypatch.undo()
    assert duration(3725.4) == "1:02:05"
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tr')
    Metrics(tmp_path, step=1).close()
    assert [row["step"] for row in read_rows(tmp_path)] == [1]
    writer = Metrics(tmp_path, step=1)
    writer.write("train", 2, {"loss": float("nan")})
    writer.close()
    assert read_rows(tmp_path)[-1] == {"kind": "train", "step": 2, "loss": None}


def test_a_damaged_metrics_file_is_set_aside_and_its_good_lines_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    good = [{"kind": "train", "step": step, "loss": 1.0 / step} for step in (1, 2, 3, 4)]
    lines = [json.dumps(row).encode() for row in good]
    damaged = [b"\xff\x00\xfe", b"[1]", b'{"kind": "train"}', b'{"kind": "train", "step": "2"}', b"{"]
    file, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.damaged"
    for number, line in enumerate(damaged):
        content = b"\n".join([lines[0], lines[1], line, lines[2], lines[3]])
        file.write_bytes(content)
        with pytest.raises(ValueError, match="metrics.jsonl: line 3 is not a row of JSON"):
            read_rows(tmp_path)
        with caplog.at_level("WARNING"):
            Metrics(tmp_path, step=3).close()
        assert read_rows(tmp_path) == good[:3]
        name = f"{aside.name}.{number}" if number else aside.name
        assert (tmp_path / name).read_bytes() == content
        assert f"{file} is damaged (line 3" in caplog.messages[-1] and name in caplog.messages[-1]


def test_numbers_that_json_cannot_hold_survive_a_checkpoint():
    means = Means()
    means.add({"loss": 1.0, "accuracy": float("nan")}, {})
    other = Means()
    other.restore(json.loads(json.dumps(means.state(), allow_nan=False)))
    assert other.take() == pytest.approx({"loss": 1.0, "accuracy": float("nan")}, nan_ok=True)


def test_options_are_plain_values():
    assert dataclasses.asdict(TrainOptions("x", 1, 1))["mesh"] == {"data": -1, "model": 1, "fsdp": False}
