"""The command that scores: what it adds to the library's scores."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import score
from gspn_jax import data
from gspn_jax.runs import new_run
from gspn_jax.training import save_parameters


class Features(nnx.Module):
    """Stands in for Inception: its names and axes."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(12, 6)) / 100, jnp.float32))

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        x = images.reshape(len(images), -1).astype(jnp.float32) @ self.kernel[...]
        return {"2048": x, "mixed_6_conv": jnp.sin(x).reshape(-1, 1, 3, 2), "logits_unbiased": 2 * x}


def test_scores_name_their_files_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(score, "load_inception", lambda path: (Features(), "0" * 64))
    images = np.random.default_rng(1).integers(0, 256, (23, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", images)
    (tmp_path / "samples.json").write_text(json.dumps({"seed": 3}))
    path = str(tmp_path / "samples.npz")
    found = score.with_inception(path, "inception.safetensors", path, batch_size=10, splits=3)
    assert found["scores"]["fid"] == pytest.approx(0, abs=1e-5) and found["scores"]["precision"] == 1
    assert found["sampling"] == {"seed": 3} and json.loads(json.dumps(found)) == found
    assert {name: len(file["sha256"]) for name, file in found["files"].items()} == {
        **{"images": 64, "statistics": 64, "inception": 64}
    }
    (tmp_path / "samples.json").write_text("not JSON")
    with pytest.raises(ValueError, match="images: expected JSON in .*samples.json, the settings of the images"):
        score.with_inception(path, "inception.safetensors", path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="inception: expected .*, got none.safetensors"):
        (tmp_path / "samples.json").unlink()
        score.with_inception(path, "none.safetensors", path)


@pytest.mark.full
def test_a_classifier_knows_its_own_images(tmp_path: Path):
    description = {
        "model": {
            "name": "gspn_t",
            "options": {"widths": (8,), "depths": (1,), "global_stages": (0,), "mixer": "attention", "stem_stride": 2},
        },
        "num_classes": 10,
        "class_names": [str(number) for number in range(10)],
        "data": {"name": "digits", "path": "", "image_size": 8, "resize": 0, "mean": [128.0] * 3, "std": [64.0] * 3},
    }
    task = new_run(description).make_task()
    params = task.init(jax.random.key(0))
    save_parameters(str(tmp_path / "run"), params, description)
    source = data.load("digits").test
    images, labels = (np.array(column) for column in zip(*(source[index] for index in range(len(source))), strict=True))
    right = int((np.asarray(jax.jit(task.logits)(params, images)).argmax(-1) == labels).sum())
    np.savez(tmp_path / "test.npz", images, labels)
    found = score.with_classifier(str(tmp_path / "test.npz"), str(tmp_path / "run"), split="test", batch_size=90)
    assert found["scores"]["classifier_frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert found["scores"]["recognised"] == right / 360
    assert found["classifier"]["reference_images"] == 360 and found["classifier"]["split"] == "test"
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "noise.npz", rng.integers(0, 256, (90, 8, 8, 3), np.uint8))
    noise = score.with_classifier(str(tmp_path / "noise.npz"), str(tmp_path / "run"), split="test", batch_size=90)
    assert noise["scores"]["classifier_frechet_distance"] > 0.1 and "recognised" not in noise["scores"]


def test_scores_are_printed_even_if_they_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    images = str(tmp_path / "gone" / "samples.npz")  # as on a disk that can only be read
    flag_values = dict(images=images, inception="", statistics="", split="train", data_path="", batch_size=50)
    values = SimpleNamespace(classifier="runs/digits", **flag_values)
    monkeypatch.setattr(score.flags, "FLAGS", values)
    monkeypatch.setattr(score, "with_classifier", lambda *_, **__: {"scores": {"distance": 1.5}})
    score.main()
    assert capsys.readouterr().out == "distance: 1.5\n"
