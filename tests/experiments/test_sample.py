"""Train a generator of a few thousand parameters, and sample from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs import generator
from experiments import generation, sample, train


def tiny_config(**changes: Any) -> Any:
    config = generator.get_config("digits")
    config.objective = "ddpm"
    options = {"mixer": "attention", "width": 8, "depth": 2, "patch": 4, "global_blocks": ()}
    config.model.update(options)
    config.update({"batch_size": 96, "steps": 3, "mesh": {"model": 8}, "intervals": {"log_steps": 1}})
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator") / "run"
    numbers = train.run(tiny_config(), str(folder)).evaluation
    assert numbers["images"] == 360 and 0 < numbers["loss"] < 5
    assert generation.lines_of(numbers)[0].startswith("parameters: loss ")
    return folder


def test_an_image_depends_on_its_number_alone(workdir: Path):
    options: Any = dict(count=5, classes=[3, 7], num_steps=4, guidance=2.0, interval=(0, 500))
    whole, labels, names = sample.run(str(workdir), batch_size=5, **options)
    parts, _, _ = sample.run(str(workdir), batch_size=2, **options)
    assert whole.shape == (5, 8, 8, 3) and whole.dtype == np.uint8 and names[3] == "3"
    np.testing.assert_array_equal(labels, [3, 7, 3, 7, 3])
    assert np.abs(whole.astype(int) - parts).max() <= 1  # rounded
    other, _, _ = sample.run(str(workdir), batch_size=5, seed=1, **options)
    assert np.abs(whole.astype(int) - other).max() > 10
    sheet = sample.contact_sheet(whole, [names[label] for label in labels])
    assert isinstance(sheet, Image.Image)


@pytest.mark.parametrize("options,words", [
    (dict(classes=[10]), r"classes: expected labels in 0\.\.9, got \(10,\)"),
    (dict(count=0), "count: expected at least 1"),
    (dict(sampler="heun"), "sampler: expected one of ddpm, ddim, euler, dpm_solver; got 'heun'"),
])  # fmt: skip
def test_bad_arguments(workdir: Path, options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        sample.run(str(workdir), **{"count": 2, "num_steps": 2, **options})


def test_unknown_objective(tmp_path: Path):
    with pytest.raises(ValueError, match="objective: expected one of ddpm, linear, gvp; got 'vp'"):
        train.run(tiny_config(objective="vp"), str(tmp_path / "run"))
