"""Compares scores of image archives with NumPy and SciPy, on features that are cheap to compute."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from gspn_jax.evaluation.scoring import LOGITS, POOLED, SPATIAL, score_by_classifier, score_by_inception

WEIGHTS = np.random.default_rng(0).normal(size=(48, 6)) / 100


def project(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) @ WEIGHTS


def inception(images: np.ndarray) -> dict[str, np.ndarray]:
    """Replaces Inception: returns cheap features with its names and axes."""
    x = project(images)
    return {POOLED: x, SPATIAL: np.sin(x), LOGITS: 2 * x}


def classifier(images: np.ndarray) -> dict[str, np.ndarray]:
    x = project(images)
    return {"features": x, "logits": x[:, :3]}


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = np.real(np.asarray(scipy.linalg.sqrtm(first @ second)))
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    samples, reference = rng.integers(0, 200, (57, 4, 4, 3), np.uint8), rng.integers(0, 256, (43, 4, 4, 3), np.uint8)
    seen = project(reference)
    moments = {"mu": seen.mean(0), "sigma": np.cov(seen, rowvar=False)}
    moments |= {"mu_s": np.sin(seen).mean(0), "sigma_s": np.cov(np.sin(seen), rowvar=False)}
    contents = {"samples": {"arr_0": samples}, "images": {"arr_0": reference}, "moments": moments}
    for name, arrays in contents.items():
        np.savez(tmp_path / f"{name}.npz", allow_pickle=False, **arrays)
    paths = {name: str(tmp_path / f"{name}.npz") for name in contents}
    return {**paths, "folder": tmp_path, "seen": project(samples), "reference": seen, "pixels": reference}


def test_scores_of_inception(files: dict[str, Any]):
    samples, reference = files["seen"], files["reference"]
    scores = score_by_inception(files["samples"], files["images"], inception, splits=3)
    assert scores["images"] == 57
    assert scores["fid"] == pytest.approx(frechet(samples, reference), rel=1e-6)
    assert scores["sfid"] == pytest.approx(frechet(np.sin(samples), np.sin(reference)), rel=1e-6)
    shares = scipy.special.softmax(2 * samples, axis=1)
    parts = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.array_split(shares, 3)]
    assert scores["inception_score"] == pytest.approx(np.mean(parts), rel=1e-6)
    assert scores["inception_score_deviation"] == pytest.approx(np.std(parts), rel=1e-6)

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=-1), axis=1)[:, 3]
        return float((np.linalg.norm(points[:, None] - centres, axis=-1) <= radii).any(1).mean())

    assert scores["precision"] == pytest.approx(share(samples, reference), abs=1e-9)
    assert scores["recall"] == pytest.approx(share(reference, samples), abs=1e-9)
    by_moments = score_by_inception(files["samples"], files["moments"], inception, splits=3)
    assert set(scores) - set(by_moments) == {"precision", "recall"}
    for name, value in by_moments.items():
        assert value == pytest.approx(scores[name], rel=1e-6)


def batches(images: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Returns two batches; the last row is padding."""
    parts = [images[:30], np.concatenate([images[30:], np.zeros_like(images[:1])])]
    masks = [np.ones(30, bool), np.arange(len(parts[1])) < len(parts[1]) - 1]
    return [{"image": part, "mask": mask} for part, mask in zip(parts, masks, strict=True)]


def test_scores_of_a_classifier(files: dict[str, Any]):
    with np.load(files["samples"]) as file:
        images = file["arr_0"]
    right = project(images)[:, :3].argmax(-1)
    labels = np.where(np.arange(57) < 19, right, (right + 1) % 3)
    np.savez(files["samples"], images, labels)
    scores = score_by_classifier(files["samples"], batches(files["pixels"]), classifier, image_size=(4, 4))
    assert scores["classifier_frechet_distance"] == pytest.approx(frechet(files["seen"], files["reference"]), rel=1e-6)
    assert scores["recognised"] == pytest.approx(19 / 57)
    assert (scores["images"], scores["reference_images"]) == (57, 43)
    own = score_by_classifier(files["images"], batches(files["pixels"]), classifier, image_size=(4, 4))
    assert own["classifier_frechet_distance"] == pytest.approx(0, abs=1e-9) and "recognised" not in own


@pytest.mark.parametrize("labels,got", [
    (np.zeros(3, int), r"int64 \(3,\)"),
    (np.zeros(57), r"float64 \(57,\)"),
    (np.array([None] * 57), "Object arrays"),
])  # fmt: skip
def test_labels_that_do_not_fit(files: dict[str, Any], labels: np.ndarray, got: str):
    np.savez(files["folder"] / "wrong.npz", np.zeros((57, 4, 4, 3), np.uint8), labels)
    with pytest.raises(ValueError, match=rf"images: expected arr_1 of integers \(57,\) in .*wrong.npz, got {got}"):
        score_by_classifier(str(files["folder"] / "wrong.npz"), [], classifier, image_size=(4, 4))


def test_images_of_another_size(files: dict[str, Any]):
    with pytest.raises(ValueError, match=r"images: expected shape \(8, 8, 3\), as the classifier's, got \(4, 4, 3\)"):
        score_by_classifier(files["samples"], [], classifier, image_size=(8, 8))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_features_that_are_not_finite(files: dict[str, Any], wrong: float):
    def broken(images: np.ndarray) -> Mapping[str, np.ndarray]:
        return inception(images) | classifier(images) | {LOGITS: np.full((len(images), 4), wrong)}

    words = f"features: expected finite numbers, got NaN or Inf in '{LOGITS}'"
    with pytest.raises(ValueError, match=words):
        score_by_inception(files["samples"], files["moments"], broken)
    with pytest.raises(ValueError, match=words):
        score_by_classifier(files["samples"], batches(files["pixels"]), broken, image_size=(4, 4))


def test_wrong_files(files: dict[str, Any]):
    def refuse(words: str, images: str = files["samples"], statistics: str = files["moments"], splits: int = 3) -> None:
        with pytest.raises(ValueError, match=words):
            score_by_inception(images, statistics, inception, splits=splits)

    other = str(files["folder"] / "other.npz")
    np.savez(other, mu=np.zeros(6))
    refuse("statistics: expected mu and sigma, or images arr_0, got neither in ", statistics=other)
    np.savez(other, mu=np.zeros(6), sigma=np.zeros((6, 5)))
    refuse(r"statistics: expected .* finite moments, got .*: mu \(6,\) and sigma \(6, 5\)", statistics=other)
    np.savez(other, mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
    refuse("statistics: expected .* finite moments, got .*: NaN or Inf in mu or sigma", statistics=other)
    Path(other).write_text("junk")
    refuse("statistics: expected an .npz file with finite moments, got ", statistics=other)
    refuse("statistics: expected an .npz file with finite moments, got .*No such file", statistics="nowhere.npz")
    refuse("images: expected at least 60 in .*samples.npz, got 57", splits=60)
    refuse("images: expected an .npz file", images=files["moments"])
