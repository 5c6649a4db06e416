"""The command that scores: what it adds to the library's scores."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import classifier
from experiments import score, train
from gspn_jax import data


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


def test_a_classifier_knows_its_own_images(tmp_path: Path):
    config = classifier.get_config("digits")
    config.model.update({"widths": (8,), "depths": (1,), "global_stages": (0,), "mixer": "attention"})
    config.update({"batch_size": 96, "steps": 40, "epochs": 3})
    config.optimizer.learning_rate = 4e-2
    workdir = str(tmp_path / "classifier")
    accuracy = train.run(config, workdir).evaluation["ema_top1"]
    source = data.load("digits").test
    images, labels = zip(*(source[index] for index in range(len(source))), strict=True)
    np.savez(tmp_path / "test.npz", np.stack(images), np.array(labels))
    found = score.with_classifier(str(tmp_path / "test.npz"), workdir, split="test", batch_size=90)
    assert found["scores"]["classifier_frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert found["scores"]["recognised"] == pytest.approx(accuracy / 100, abs=0.003) and accuracy > 20
    assert found["classifier"]["reference_images"] == 360 and found["classifier"]["split"] == "test"
    np.savez(tmp_path / "noise.npz", np.random.default_rng(0).integers(0, 256, (90, 8, 8, 3), np.uint8), labels[:90])
    noise = score.with_classifier(str(tmp_path / "noise.npz"), workdir, split="test", batch_size=90)["scores"]
    assert noise["classifier_frechet_distance"] > 0.1 and noise["recognised"] < 0.4
