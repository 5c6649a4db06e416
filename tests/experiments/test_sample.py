"""Train a generator of a few thousand parameters, and sample from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import classifier, generator
from experiments import evaluate, generation, sample, train
from experiments.sample import Generator, Sampling


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
    folder = tmp_path_factory.mktemp("generator") / "run"
    numbers = train.run(tiny_config(), str(folder)).evaluation
    assert numbers["images"] == 360 and 0 < numbers["loss"] < 5
    assert generation.lines_of(numbers)[0].startswith("parameters: loss ")
    return str(folder)


def test_an_image_depends_on_its_number_alone(workdir: str):
    how = Sampling(num_steps=4, guidance=2.0, interval=(0, 500))
    one = Generator(workdir, how, classes=[3, 7])
    whole = sample.run(one, count=5, batch_size=5)
    assert whole.shape == (5, 8, 8, 3) and whole.dtype == np.uint8 and one.class_names[3] == "3"
    np.testing.assert_array_equal(one.labels(np.arange(5)), [3, 7, 3, 7, 3])
    parts = sample.run(one, count=5, batch_size=2)
    assert np.abs(whole.astype(int) - parts).max() <= 1  # rounded
    other = sample.run(Generator(workdir, Sampling(num_steps=4, seed=1)), count=5)
    assert np.abs(whole.astype(int) - other).max() > 10


def test_maps_of_other_sizes(workdir: str):
    images = sample.run(Generator(workdir, Sampling("ddim", 2), image_size=(4, 12)), count=2)
    assert images.shape == (2, 4, 12, 3) and images.std() > 10


def test_a_file_goes_on_where_it_was_interrupted(workdir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    how = Sampling("dpm_solver", 2)
    whole = sample.run(Generator(workdir, how), count=7)
    npz = str(tmp_path / "samples.npz")
    draw = Generator.images

    def interrupted(self: Generator, samples: np.ndarray) -> np.ndarray:
        if 4 in samples:
            raise KeyboardInterrupt
        return draw(self, samples)

    monkeypatch.setattr(Generator, "images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.run(Generator(workdir, how), count=7, batch_size=2, npz=npz)
    assert not Path(npz).exists() and len(list((tmp_path / "samples.parts").glob("*.npz"))) == 2
    drawn = []
    monkeypatch.setattr(Generator, "images", lambda self, samples: drawn.append(samples[0]) or draw(self, samples))
    shown = sample.run(Generator(workdir, how), count=7, batch_size=2, npz=npz)
    assert drawn == [4, 6] and not (tmp_path / "samples.parts").exists()
    with np.load(npz) as file:
        np.testing.assert_array_equal(file["arr_0"], shown)
        np.testing.assert_array_equal(file["arr_1"], np.arange(7))
    assert np.abs(shown.astype(int) - whole).max() <= 1
    settings = json.loads((tmp_path / "samples.json").read_text())
    assert settings["sampler"] == "dpm_solver" and settings["count"] == 7 and settings["autoencoder"] is None
    np.testing.assert_array_equal(sample.run(Generator(workdir, how), count=7, batch_size=2, npz=npz), shown)
    assert drawn == [4, 6]  # it is complete
    with pytest.raises(ValueError, match=r"npz: expected the settings that .* was made with \(seed=0\), got seed=1"):
        sample.run(Generator(workdir, Sampling("dpm_solver", 2, seed=1)), count=7, batch_size=2, npz=npz)


@pytest.mark.parametrize("options,words", [
    (dict(classes=[10]), r"classes: expected labels in 0\.\.9, got \(10,\)"),
    (dict(sampling=Sampling("heun")), "sampler: expected one of ddpm, ddim, euler, dpm_solver; got 'heun'"),
    (dict(sampling=Sampling(num_steps=-1)), "steps: expected 2 to 1000, or 0 for the sampler's own, got -1"),
    (dict(sampling=Sampling("ddim", 1001)), "steps: expected 1 to 1000, or 0 for the sampler's own, got 1001"),
    (dict(sampling=Sampling(guidance=float("nan"))), "guidance: expected a finite number, got nan"),
    (dict(sampling=Sampling(interval=(5, 1))), r"interval: expected a smaller and a larger time, got \(5, 1\)"),
    (dict(sampling=Sampling(guided_channels=0)), "guided_channels: expected at least 1, got 0"),
    (dict(sampling=Sampling(seed=-1)), r"seed: expected 0 to 2\*\*31 - 1, got -1"),
    (dict(image_size=(0, 8)), "image_size: expected multiples of 1, got 0, 8"),
    (dict(image_size=(8, 6)), "image_size: 8, 6: latents: expected shape .* divisible by patch = 4"),
])  # fmt: skip
def test_bad_arguments(workdir: str, options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        Generator(workdir, **options)


def test_bad_counts_and_names(workdir: str):
    one = Generator(workdir, Sampling(num_steps=2))
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        sample.run(one, count=0)
    with pytest.raises(ValueError, match="count: expected at most 100 without --npz, got 101"):
        sample.run(one, count=101)
    with pytest.raises(ValueError, match="npz: expected a name that ends in .npz, got samples"):
        sample.run(one, npz="samples")


def test_unknown_objective(tmp_path: Path):
    with pytest.raises(ValueError, match="objective: expected one of ddpm, linear, gvp; got 'vp'"):
        train.run(tiny_config(objective="vp"), str(tmp_path / "run"))


def test_a_run_starts_from_another(workdir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train.run(tiny_config(init_from=workdir, objective="gvp", steps=1), str(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert f"from {workdir}, step 3, moving average:" in printed and "starts fresh" not in printed
    assert "differs: objective: ddpm there, gvp here; --config.objective=ddpm computes the same" in printed


def test_a_classifier_does_not_start_from_a_generator(workdir: str, tmp_path: Path):
    config = classifier.get_config("digits")
    config.model.update({"widths": (8,), "depths": (1,), "global_stages": (0,), "mixer": "attention"})
    config.update({"init_from": workdir, "steps": 1, "batch_size": 96})
    with pytest.raises(ValueError, match="init_from: expected a run of the same task, classification or generation"):
        train.run(config, str(tmp_path / "run"))


def test_a_network_that_is_not_known(tmp_path: Path):
    config = tiny_config()
    config.model.name = "unet"
    with pytest.raises(ValueError, match=r"model\.name: expected one of gspn_s2, .*, dit_xl2; got 'unet'"):
        train.run(config, str(tmp_path / "run"))


def test_a_generator_is_no_classifier(workdir: str):
    with pytest.raises(ValueError, match="workdir: expected a run of classification, got one of generation"):
        evaluate.run(workdir)
