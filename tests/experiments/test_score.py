"""Scores of files of images against NumPy and SciPy, by features that are cheap to compute."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from flax import nnx
from safetensors.numpy import save_file

from configs import classifier
from experiments import score, train
from gspn_jax import data

WEIGHTS = np.random.default_rng(0).normal(size=(48, 6)).astype(np.float32) / 100


class Features(nnx.Module):
    """What Inception puts out, as far as names and axes go."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.asarray(WEIGHTS))

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        x = images.reshape(len(images), -1).astype(jnp.float32) @ self.kernel[...]
        return {"2048": x, "mixed_6_conv": jnp.sin(x).reshape(-1, 1, 3, 2), "logits_unbiased": 2 * x}


def features(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) @ WEIGHTS


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = np.real(np.asarray(scipy.linalg.sqrtm(first @ second)))
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(score, "fid_inception", lambda arrays: Features())
    save_file({"nothing": np.zeros(1, np.float32)}, tmp_path / "inception.safetensors")
    rng = np.random.default_rng(1)
    samples, reference = rng.integers(0, 200, (57, 4, 4, 3), np.uint8), rng.integers(0, 256, (43, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", samples)
    (tmp_path / "samples.json").write_text(json.dumps({"seed": 3}))
    np.savez(tmp_path / "images.npz", reference)
    seen = features(reference)
    sines = np.sin(seen)
    pairs = dict(mu=seen.mean(0), sigma=np.cov(seen, rowvar=False))
    pairs |= dict(mu_s=sines.mean(0), sigma_s=np.cov(sines, rowvar=False))
    np.savez(tmp_path / "moments.npz", allow_pickle=False, **pairs)
    return {"folder": tmp_path, "samples": features(samples), "reference": seen}


def test_scores_of_inception(files: dict[str, Any]):
    folder, samples, reference = files["folder"], files["samples"], files["reference"]
    options: Any = dict(batch_size=10, splits=3)
    given = str(folder / "samples.npz"), str(folder / "inception.safetensors")
    found = score.with_inception(*given, str(folder / "images.npz"), **options)
    scores = found["scores"]
    assert scores["images"] == 57 and found["sampling"] == {"seed": 3}
    assert scores["fid"] == pytest.approx(frechet(samples, reference), rel=1e-5)
    assert scores["sfid"] == pytest.approx(frechet(np.sin(samples), np.sin(reference)), rel=1e-5)
    shares = scipy.special.softmax(2 * samples, axis=1)
    parts = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.array_split(shares, 3)]
    assert scores["inception_score"] == pytest.approx(np.mean(parts), rel=1e-5)

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=-1), axis=1)[:, 3]
        return float((np.linalg.norm(points[:, None] - centres, axis=-1) <= radii).any(1).mean())

    assert scores["precision"] == pytest.approx(share(samples, reference), abs=0.02)
    assert scores["recall"] == pytest.approx(share(reference, samples), abs=0.025)
    moments = score.with_inception(*given, str(folder / "moments.npz"), **options)["scores"]
    assert moments["fid"] == pytest.approx(scores["fid"], rel=1e-5) and "precision" not in moments
    assert moments["sfid"] == pytest.approx(scores["sfid"], rel=1e-5)
    assert {len(file["sha256"]) for file in found["files"].values()} == {64}


def test_files_that_are_none(files: dict[str, Any]):
    folder = files["folder"]
    given = str(folder / "samples.npz"), str(folder / "inception.safetensors")
    np.savez(folder / "other.npz", mu=np.zeros(6))
    with pytest.raises(ValueError, match="statistics: expected mu and sigma, or images arr_0, got none of them"):
        score.with_inception(*given, str(folder / "other.npz"), splits=3)
    with pytest.raises(ValueError, match="statistics: expected an .npz file, got "):
        score.with_inception(*given, str(folder / "samples.json"), splits=3)
    with pytest.raises(ValueError, match="images: expected at least 60 in .*samples.npz, got 57"):
        score.with_inception(*given, str(folder / "moments.npz"), splits=60)
    with pytest.raises(ValueError, match="inception: expected a safetensors, .pt or .pth file, got .*none.safetensors"):
        score.with_inception(given[0], str(folder / "none.safetensors"), str(folder / "moments.npz"), splits=3)
    with pytest.raises(ValueError, match="images: expected an .npz file"):
        score.with_inception(str(folder / "moments.npz"), given[1], given[0], splits=3)


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
    path = str(tmp_path / "test.npz")
    found = score.with_classifier(path, workdir, split="test", batch_size=90)
    assert found["scores"]["classifier_frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert found["scores"]["recognised"] == pytest.approx(accuracy / 100, abs=0.003) and accuracy > 20
    assert found["classifier"]["reference_images"] == 360
    np.savez(tmp_path / "noise.npz", np.random.default_rng(0).integers(0, 256, (90, 8, 8, 3), np.uint8), labels[:90])
    noise = score.with_classifier(str(tmp_path / "noise.npz"), workdir, batch_size=90)["scores"]
    assert noise["classifier_frechet_distance"] > 0.1 and noise["recognised"] < 0.4
    np.savez(tmp_path / "labels.npz", np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"images: expected arr_1 of shape \(4,\) in .*, got \(3,\)"):
        score.with_classifier(str(tmp_path / "labels.npz"), workdir)
    (tmp_path / "test.json").write_text("no JSON")
    with pytest.raises(ValueError, match="images: expected JSON in .*test.json, how they were made"):
        score.with_classifier(path, workdir)
    np.savez(tmp_path / "small.npz", np.zeros((4, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images: expected shape \(8, 8, 3\), as the classifier's, got \(4, 4, 3\)"):
        score.with_classifier(str(tmp_path / "small.npz"), workdir)
