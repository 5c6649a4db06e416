"""Samples from a generator of a few thousand parameters."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from configs import classifier, generator
from experiments import evaluate, sample, settings, train
from gspn_jax import data, load_run, sampling
from gspn_jax.evaluation import image_archive
from gspn_jax.sampling import ImageSampler, Sampling
from gspn_jax.training import save_parameters


def tiny_config(**changes: Any) -> Any:
    config = generator.get_config("digits")
    options = {"mixer": "attention", "width": 8, "depth": 2, "patch": 4, "global_blocks": ()}
    config.model.update(options)
    config.update({"objective": "ddpm", "batch_size": 96, "steps": 3})
    config.update({"mesh": {"model": 8}, "intervals": {"log_steps": 1}})
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("generator") / "run")
    made = settings.make_run(tiny_config(), data.load("digits"))
    save_parameters(folder, jax.jit(made.task.init)(jax.random.key(0)), made.description)
    return folder


@pytest.fixture(scope="module")
def run(workdir: str) -> Any:
    return load_run(workdir)


@pytest.mark.full
def test_training_reports_the_loss_of_held_out_images(tmp_path: Path):
    made, result = train.run(tiny_config(), str(tmp_path / "run"))
    assert result.evaluation["images"] == 360 and 0 < result.evaluation["loss"] < 5
    assert made.summary(result.evaluation)[0].startswith("parameters: loss ")


def test_an_image_depends_on_its_number_only(run: Any):
    options: dict[str, Any] = dict(num_steps=4, guidance=2.0, interval=(0, 500))
    labels = np.array([3, 7, 3, 7, 3])
    drawing = run.sampler(Sampling(**options))  # compiles once for all batches
    whole = drawing.images(labels, np.arange(5))
    assert whole.shape == (5, 8, 8, 3) and whole.dtype == np.uint8 and run.class_names[3] == "3"
    for part in (np.arange(2), np.arange(2, 4), np.arange(4, 5), np.arange(3, 5)):
        assert np.abs(whole[part].astype(int) - drawing.images(labels[part], part)).max() <= 1  # rounded
    assert np.abs(whole[:2].astype(int) - drawing.images(labels[:2], np.arange(2, 4))).max() > 10


@pytest.mark.full
def test_maps_of_other_sizes_and_other_seeds(run: Any):
    options: dict[str, Any] = dict(sampler="ddim", num_steps=2, image_size=(4, 12))
    images = run.sample([0, 1, 0], batch_size=2, **options)
    assert images.shape == (3, 4, 12, 3) and images.std() > 10
    last = run.sample([1, 0], first=1, **options)
    assert np.abs(images[1:].astype(int) - last).max() <= 1
    assert np.abs(images.astype(int) - run.sample([0, 1, 0], seed=1, **options)).max() > 10


def test_held_out_losses_are_evaluated_again(workdir: str):
    results, lines = evaluate.run(workdir)
    assert results["images"] == 360 and lines[1] == f"parameters: loss {results['loss']:.4f}"


def test_pixels_are_prepared_for_the_network(run: Any):
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    np.testing.assert_allclose(run.preprocess(image), image[None] / 127.5 - 1, atol=1e-6)


def test_a_file_goes_on_where_it_was_interrupted(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels, how = np.arange(7, dtype=np.int32), Sampling("dpm_solver", 2)
    whole = run.sample(labels, sampler="dpm_solver", num_steps=2)
    npz = str(tmp_path / "samples.npz")
    draw = ImageSampler.images

    def interrupted(self: ImageSampler, labels: np.ndarray, samples: np.ndarray, **options: Any) -> np.ndarray:
        if 4 in samples:
            raise KeyboardInterrupt
        return draw(self, labels, samples, **options)

    monkeypatch.setattr(ImageSampler, "images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampling.draw_archive(run.sampler(how), labels, npz, batch_size=2)
    assert not Path(npz).exists() and len(list((tmp_path / "samples.parts").glob("0*.npz"))) == 2
    drawn = []

    def counted(self: ImageSampler, labels: np.ndarray, samples: np.ndarray, **options: Any) -> np.ndarray:
        drawn.append(int(samples[0]))
        return draw(self, labels, samples, **options)

    monkeypatch.setattr(ImageSampler, "images", counted)
    shown = sampling.draw_archive(run.sampler(how), labels, npz, batch_size=2).first(7)
    assert drawn == [4, 6] and not (tmp_path / "samples.parts").exists()
    with np.load(npz) as file:
        np.testing.assert_array_equal(file["arr_0"], shown)
        np.testing.assert_array_equal(file["arr_1"], np.arange(7))
    assert np.abs(shown.astype(int) - whole).max() <= 1
    settings = json.loads((tmp_path / "samples.json").read_text())
    assert settings["sampler"] == "dpm_solver" and settings["count"] == 7 and settings["autoencoder"] is None
    again = sampling.draw_archive(run.sampler(how), labels, npz, batch_size=2).first(7)
    np.testing.assert_array_equal(again, shown)
    assert drawn == [4, 6]  # it is complete
    with pytest.raises(
        ValueError, match=r"npz: expected the settings that .*samples.npz was made with \(seed=0\), got seed=1"
    ):
        sampling.draw_archive(run.sampler(Sampling("dpm_solver", 2, seed=1)), labels, npz, batch_size=2)


def test_images_of_a_file_come_in_blocks(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images)
    blocks = list(image_archive.image_blocks(str(tmp_path / "a.npz"), 2))
    assert [len(block) for block in blocks] == [2, 2, 1] and image_archive.image_count(str(tmp_path / "a.npz")) == 5
    np.testing.assert_array_equal(np.concatenate(blocks), images)
    np.savez(tmp_path / "b.npz", images.astype(np.float32))
    for name in ("b.npz", "c.npz"):
        with pytest.raises(
            ValueError, match=r"images: expected an .npz file with arr_0 uint8 \(N, H, W, 3\), H and W at least 1, got"
        ):
            list(image_archive.image_blocks(str(tmp_path / name)))


@pytest.mark.parametrize("options,words", [
    (dict(labels=[10]), r"labels: expected labels in 0\.\.9, got 10"),
    (dict(labels=[-1]), r"labels: expected labels in 0\.\.9, got -1"),
    (dict(labels=[0.5]), r"labels: expected integers \(1,\), got float64"),
    (dict(labels=3), r"labels: expected one integer for each image, got shape \(\)"),
    (dict(sampler="heun"), "sampler: expected one of ddpm, ddim, euler, dpm_solver; got 'heun'"),
    (dict(num_steps=-1), "num_steps: expected 2 to 1000, or 0 for the sampler's own, got -1"),
    (dict(sampler="ddim", num_steps=1001), "num_steps: expected 1 to 1000, or 0 for the sampler's own, got 1001"),
    (dict(guidance=float("nan")), "guidance: expected a finite number, got nan"),
    (dict(interval=(5, 1)), r"interval: expected a smaller and a larger time, got \(5, 1\)"),
    (dict(guided_channels=0), "guided_channels: expected 1 to 3, got 0"),
    (dict(guided_channels=99), "guided_channels: expected 1 to 3, got 99"),
    (dict(autoencoder="vae.safetensors"), "autoencoder: expected none, since this network draws pixels"),
    (dict(seed=-1), r"seed: expected 0 to 2\*\*31 - 1, got -1"),
    (dict(image_size=(0, 8)), "image_size: expected multiples of 1, got 0, 8"),
    (dict(image_size=(8, 6)), "image_size: 8, 6: latents: expected shape .* divisible by patch = 4"),
])  # fmt: skip
def test_bad_arguments(run: Any, options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        run.sample(**{"labels": [0], **options})


def test_a_picture_that_cannot_be_written_shows_before_anything_is_drawn(tmp_path: Path):
    sample.check_output(str(tmp_path / "X.PNG"))
    (tmp_path / "folder.png").mkdir()
    for name in ("none/x.png", "x.txt", "x.psd", "x.xbm", "folder.png", "x"):
        path = tmp_path / name
        with pytest.raises(ValueError, match="output: expected"):
            sample.check_output(str(path))


@pytest.mark.full
def test_the_command_draws_a_grid(workdir: str, tmp_path: Path, command: Any, capsys: Any):
    output = tmp_path / "grid.png"
    command(sample, f"--workdir={workdir}", f"--output={output}", "--count=3", "--num_steps=2", "--classes=1,4")
    with Image.open(output) as sheet:
        assert sheet.size[0] > 90
    assert capsys.readouterr().out == f"{output}: 3 images\n"


def test_unknown_objective(tmp_path: Path):
    with pytest.raises(ValueError, match="objective: expected one of ddpm, linear, gvp; got 'vp'"):
        train.run(tiny_config(objective="vp"), str(tmp_path / "run"))


@pytest.mark.full
def test_a_run_starts_from_another(workdir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train.run(tiny_config(init_from=workdir, objective="gvp", steps=1), str(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert f"from {workdir}, step 0, parameters:" in printed and "starts fresh" not in printed
    line = "differs: objective: ddpm in the source, gvp in this run; --config.objective=ddpm computes the same"
    assert line in printed


def test_a_classifier_does_not_start_from_a_generator(workdir: str, tmp_path: Path):
    config = classifier.get_config("digits")
    config.model.update({"widths": (8,), "depths": (1,), "global_stages": (0,), "mixer": "attention"})
    config.update({"init_from": workdir, "steps": 1, "batch_size": 96})
    with pytest.raises(ValueError, match="init_from: expected a run of classification, got one of generation"):
        train.run(config, str(tmp_path / "run"))


def test_a_network_that_is_not_known(tmp_path: Path):
    config = tiny_config()
    mistakes = {
        "unet": r"model\.name: expected one of gspn_t, .*; got 'unet'",
        "gspn_t": "model.name: expected a generator or a dit, as generation needs, got 'gspn_t', a classifier",
    }
    for name, words in mistakes.items():
        config.model.name = name
        with pytest.raises(ValueError, match=words):
            train.run(config, str(tmp_path / "run"))


def test_a_generator_is_no_classifier(workdir: str):
    with pytest.raises(ValueError, match="workdir: expected a run of classification, got one of generation"):
        load_run(workdir, task="classification")
    with pytest.raises(ValueError, match="parameters: expected ema or raw, got 'average'"):
        load_run(workdir, parameters="average")
