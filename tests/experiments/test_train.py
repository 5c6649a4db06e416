"""Train, evaluate, predict and fine-tune, with a network of a few thousand parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from configs import classifier
from experiments import evaluate, settings, train
from gspn_jax import data, load_run
from gspn_jax.training import CheckpointError, load_parameters, save_parameters
from gspn_jax.training.metrics import read_rows

ATTENTION = {"widths": (8,), "depths": (1,), "global_stages": (0,), "mixer": "attention"}
TINY = {"widths": (8,), "depths": (1,), "global_stages": (0,), "proxy_rank": 2}


def tiny_config(**changes: Any) -> Any:
    config = classifier.get_config("digits")
    config.model.update(ATTENTION)  # compiles in a third of the time
    config.update({"batch_size": 96, "steps": 4, "mesh": {"model": 8}, "intervals": {"log_steps": 1}})
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    workdir = tmp_path_factory.mktemp("digits") / "run"
    return workdir, train.run(tiny_config(), str(workdir))[1].evaluation


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with the parameters that a run starts from."""
    workdir = tmp_path_factory.mktemp("digits") / "saved"
    made = settings.make_run(tiny_config(), data.load("digits"))
    save_parameters(workdir, jax.jit(made.task.init)(jax.random.key(0)), made.description)
    return workdir


@pytest.mark.full
def test_what_training_reports_evaluation_finds_again(trained: tuple[Path, dict[str, float]]):
    workdir, numbers = trained
    results, lines = evaluate.run(str(workdir))
    assert lines[-1] == f"top-1: {numbers['ema_top1']:.2f}%"
    assert results["step"] == 4 and results["images"] == 360
    for name in ("top1", "top5", "ema_top1", "ema_top5"):
        assert results[name] == numbers[name], name
    assert results["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
    assert json.loads((workdir / "config.json").read_text())["class_names"] == [str(digit) for digit in range(10)]
    assert [row["step"] for row in read_rows(workdir) if row["kind"] == "train"] == [1, 2, 3, 4]


@pytest.mark.full
def test_an_interrupted_run_sees_the_batches_of_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Through the real pipeline: augmented pictures, read ahead by threads, from where the checkpoint says."""
    intervals = {"log_steps": 1, "checkpoint_epochs": 0.143, "evaluate_epochs": 0.0}  # every 2 of 14 steps
    config = tiny_config(steps=6, intervals=intervals)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.run(config, str(whole))

    plain, asked = data.Batches.__next__, []

    def interrupted(self: data.Batches) -> dict[str, Any]:
        asked.append(None)
        if len(asked) == 6:
            raise ConnectionResetError("interrupted")
        return plain(self)

    monkeypatch.setattr(data.Batches, "__next__", interrupted)
    with pytest.raises(ConnectionResetError):
        train.run(config, str(halves))
    asked.clear()
    train.run(config, str(halves))
    assert len(asked) < 6  # it went on and did not start again
    for ema in (False, True):
        (want, _), (got, meta) = (load_parameters(folder, ema=ema) for folder in (whole, halves))
        assert meta["step"] == 6
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_prediction_agrees_with_evaluation(saved: Path, tmp_path: Path):
    run, digits = load_run(saved), data.load("digits").test
    images = np.stack([digits[index][0] for index in range(40)])
    labels = [digits[index][1] for index in range(40)]
    answers = run.predict(images, top=10)
    logits = np.asarray(run.model(run.preprocess(images)))
    assert [int(classes[0][0]) for classes in answers] == logits.argmax(-1).tolist()
    for classes in answers:
        assert {name for name, _ in classes} == {str(digit) for digit in range(10)}
        shares = [share for _, share in classes]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-5)
    right = run.evaluate(_First(digits, 40), batch_size=40)
    assert right["top1"] == pytest.approx(100 * np.mean(logits.argmax(-1) == labels))
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    assert run.predict(tmp_path / "image.png", top=1) == [answers[0][:1]]


class _First:
    """The first images of a source."""

    def __init__(self, source: data.Source, count: int):
        self.source, self.count = source, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        return self.source[index]  # pyright: ignore[reportReturnType]

    def describe(self, index: int, /) -> str:
        return self.source.describe(index)


def test_pictures_of_any_kind_are_prepared_alike(saved: Path, tmp_path: Path):
    run = load_run(saved)
    upright = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    picture = Image.fromarray(np.rot90(upright).copy())  # what a camera turned to the right records
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    prepared = run.pictures([tmp_path / "turned.png", upright, Image.fromarray(upright)])
    np.testing.assert_array_equal(prepared, [upright] * 3)
    grey = np.full((20, 9), 90, np.uint8)
    np.testing.assert_array_equal(run.pictures(grey), np.full((1, 8, 8, 3), 90))
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    for image, words in (
        (tmp_path / "text.png", "text.png: not a readable image"),
        (tmp_path / "pipe.png", "^images: [^:]*pipe.png: expected a regular file"),
        (tmp_path / "none.png", "none.png: cannot be read"),
        (np.zeros((8, 8, 3)), r"image 0: expected uint8 \(H, W, 3\) or \(H, W\), got float64"),
        (np.zeros((0, 8, 3), np.uint8), r"image 0: expected uint8 .* got uint8 \(0, 8, 3\)"),
        ([], "at least one image"),
    ):
        with pytest.raises(ValueError, match=words):
            run.predict(image)
    with pytest.raises(ValueError, match="top: expected an integer >= 1, got 0"):
        run.predict(grey, top=0)


def test_evaluation_on_other_classes_is_refused(saved: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="expected 10 classes, as the model has, got 3"):
        evaluate.run(str(saved), name="npz", path=three_classes(tmp_path))


def three_classes(folder: Path) -> str:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        f"x_{split}": rng.integers(0, 255, (96, 12, 12, 3), np.uint8) for split in ("train", "test")
    }
    arrays |= {f"y_{split}": np.arange(96, dtype=np.int32) % 3 for split in ("train", "test")}
    path = folder / "three.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.full
def test_fine_tuning_replaces_the_head_also_at_another_resolution(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_config(init_from=str(trained[0]), steps=1)
    config.data.update({"name": "npz", "path": three_classes(tmp_path), "image_size": 12})
    config.optimizer.update({"learning_rate": 0.0, "min_learning_rate": 0.0, "warmup_learning_rate": 0.0})
    train.run(config, str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert f"from {trained[0]}, step 4, moving average:" in out and "starts fresh: head" in out
    before, after = load_parameters(trained[0])[0], load_parameters(tmp_path / "run", ema=False)[0]
    np.testing.assert_array_equal(before["stem"]["first"]["kernel"], after["stem"]["first"]["kernel"])
    heads = [leaf.shape[-1] for leaf in (before["head"]["kernel"], after["head"]["kernel"])]
    assert heads == [10, 3]


def run_command(module: str, *arguments: str, largest_file: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command; largest_file: in blocks of 512 bytes, where not 0."""
    command = [sys.executable, "-m", f"experiments.{module}", *arguments]
    if largest_file:
        command = ["sh", "-c", f'ulimit -f {largest_file}; exec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)


def test_mistakes_show_before_anything_is_compiled(tmp_path: Path):
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        train.run(tiny_config(batch_size=0), str(tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoints under /nowhere"):
        train.run(tiny_config(init_from="/nowhere"), str(tmp_path))


PRESET = "--config=configs/classifier.py:digits"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((PRESET, "--config.optimizer.lr=1"), "no such key in the configuration: --config.optimizer.lr=1"),
        ((PRESET + "x",), "preset: expected one of digits"),
        ((PRESET, "--config.data.name=image_folder", "--config.data.path=/nowhere"), "/nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(arguments: tuple[str, ...], words: str, tmp_path: Path):
    process = run_command("train", f"--workdir={tmp_path / 'run'}", *arguments)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.full
def test_a_disk_that_fills_up_is_one_line_too(tmp_path: Path):
    """Files may not grow beyond 20 kB: the checkpoint cannot be written, all smaller files can."""
    small = [f"--config.model.{name}={value}" for name, value in (ATTENTION | {"widths": (48,)}).items()]
    process = run_command("train", f"--workdir={tmp_path / 'run'}", PRESET, "--config.steps=2", *small, largest_file=40)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: cannot write checkpoint {tmp_path / 'run' / 'checkpoints' / '2'}: ")
    assert line.endswith("there is no checkpoint yet") and len(line) < 600


@pytest.mark.full
def test_the_commands_end_with_the_accuracy(tmp_path: Path):
    workdir = f"--workdir={tmp_path / 'run'}"
    small = [f"--config.model.{name}={value}" for name, value in TINY.items()]
    process = run_command("train", PRESET, workdir, "--config.steps=2", "--config.profile_steps=1:2", *small)
    assert process.returncode == 0, process.stderr
    last = process.stdout.splitlines()[-1]
    assert last.startswith("top-1: ") and last.endswith("%")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    process = run_command("evaluate", workdir)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == last
