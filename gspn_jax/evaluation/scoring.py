"""Scores of an archive of images: FID, sFID, inception score, precision and recall, or a classifier's distance."""

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from gspn_jax.batching import batched
from gspn_jax.evaluation.frechet import (
    Moments,
    RunningInceptionScore,
    RunningMoments,
    frechet_distance,
    precision_and_recall,
)
from gspn_jax.evaluation.image_archive import IMAGES, LABELS, image_blocks, image_count
from gspn_jax.evaluation.inception import Inception

Features = Callable[[np.ndarray], Mapping[str, np.ndarray]]
POOLED, SPATIAL, LOGITS = "2048", "mixed_6_conv", "logits_unbiased"
_BLOCK = 500  # images read at a time


def inception_features(model: Inception, batch_size: int = 50) -> Features:
    """Returns a function from images to the features that the scores need.

    Args:
        model: the Inception network.
        batch_size: see `gspn_jax.batching.batched`.

    Returns:
        images uint8 (B, H, W, 3) -> {POOLED: (B, 2048), SPATIAL: (B, 2023), LOGITS: (B, 1008)}, float32.
    """
    graph, state = nnx.split(model)

    def compute(state: Any, images: jax.Array) -> dict[str, jax.Array]:
        features = nnx.merge(graph, state)(images)
        spatial = features[SPATIAL].reshape(len(images), -1)  # (B, 17, 17, 7) to (B, 2023)
        return {POOLED: features[POOLED], SPATIAL: spatial, LOGITS: features[LOGITS]}

    return batched(compute, state, batch_size)


def score_by_inception(images: str, statistics: str, features: Features, *, splits: int = 10) -> dict[str, float]:
    """Compares images with a reference by FID, sFID, inception score, precision and recall.

    Args:
        images: .npz file with arr_0, uint8 (N, H, W, 3).
        statistics: .npz file of the reference. It holds moments mu and sigma, mu_s and sigma_s for sFID, and images
            arr_0. Precision and recall need the images; moments that are missing are computed from them.
        features: see `inception_features`.
        splits: parts of the images for the inception score.

    Returns:
        "images" (their number), "fid", "inception_score" and "inception_score_deviation"; "sfid" if the reference has
        moments or images for it; "precision" and "recall" if the reference has images.

    Raises:
        ValueError: a file is missing or damaged, or features are not finite.
    """
    count = _counted(images, max(2, splits))
    given, has_images = _given_moments(statistics)
    if POOLED not in given and not has_images:
        raise ValueError(f"statistics: expected mu and sigma, or images {IMAGES}, got neither in {statistics}")
    inception_score = RunningInceptionScore(count, splits)

    def features_and_score(block: np.ndarray) -> Mapping[str, np.ndarray]:
        found = _finite(features(block))
        inception_score.add(found[LOGITS])
        return found

    kept = (POOLED,) if has_images else ()  # precision and recall compare features
    moments, rows = _features_of_file(images, features_and_score, moments=(POOLED, SPATIAL), kept=kept)
    reference, reference_rows = dict(given), {}
    if has_images:
        lacking = {POOLED, SPATIAL} - set(given)
        made, reference_rows = _features_of_file(statistics, features, moments=lacking, kept=kept)
        reference |= made
    scores = {"images": count, "fid": frechet_distance(moments[POOLED], reference[POOLED])}
    if SPATIAL in reference:
        scores["sfid"] = frechet_distance(moments[SPATIAL], reference[SPATIAL])
    scores["inception_score"], scores["inception_score_deviation"] = inception_score.score()
    if reference_rows:
        scores["precision"], scores["recall"] = precision_and_recall(reference_rows[POOLED], rows[POOLED])
    return scores


def score_by_classifier(
    images: str, reference: Iterable[Mapping[str, np.ndarray]], features: Features, *, image_size: tuple[int, int]
) -> dict[str, float]:
    """Compares images with reference images by the features of a classifier. The distance is not FID.

    Args:
        images: .npz file with arr_0, uint8 (N, H, W, 3), and optionally integer labels arr_1, (N,).
        reference: batches {"image": uint8 (B, H, W, 3), "mask": bool (B,)}, such as
            `gspn_jax.data.evaluation_batches` yields.
        features: images uint8 (B, H, W, 3) -> {"features": (B, F), "logits": (B, classes)}.
        image_size: (H, W) of the classifier's input.

    Returns:
        "images", "reference_images", "classifier_frechet_distance" and, if the file has labels, "recognised": the share
        of images that the classifier assigns to their label.

    Raises:
        ValueError: a file is missing or damaged, images have another size, or features are not finite.
    """
    count, labels = _counted(images, 2), _labels(images)
    shape = (*image_size, 3)
    moments, rows = _features_of_file(images, features, moments=("features",), kept=("logits",), shape=shape)
    total = RunningMoments(len(moments["features"][0]))
    for batch in reference:
        total.add(_finite(features(batch["image"]))["features"][batch["mask"]])
    scores = {
        "images": count,
        "reference_images": total.count,
        "classifier_frechet_distance": frechet_distance(moments["features"], total.moments()),
    }
    if labels is not None:
        scores["recognised"] = float((rows["logits"].argmax(-1) == labels).mean())
    return scores


def _features_of_file(
    path: str,
    features: Features,
    *,
    moments: Iterable[str],
    kept: Sequence[str],
    shape: tuple[int, ...] | None = None,
) -> tuple[dict[str, Moments], dict[str, np.ndarray]]:
    """Computes features of all images of a file.

    Args:
        path: .npz file.
        features: see `inception_features`.
        moments: names of the features whose moments are returned.
        kept: names of the features whose rows are returned.
        shape: expected (H, W, 3), or None for any.

    Returns:
        Moments by name, and rows (N, F) by name.

    Raises:
        ValueError: images of another shape, or features that are not finite.
    """
    sums: dict[str, RunningMoments] = {}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in kept}
    for block in tqdm(image_blocks(path, _BLOCK), unit="block", desc=Path(path).name):
        if shape is not None and block.shape[1:] != shape:
            raise ValueError(f"images: expected shape {shape}, as the classifier's, got {block.shape[1:]}")
        found = _finite(features(block))
        for name in moments:
            sums.setdefault(name, RunningMoments(found[name].shape[1])).add(found[name])
        for name in kept:
            rows[name].append(found[name])
    return (
        {name: total.moments() for name, total in sums.items()},
        {name: np.concatenate(parts) for name, parts in rows.items()},
    )


def _finite(features: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Returns its argument; ValueError for NaN or Inf."""
    for name, values in features.items():
        if not np.all(np.isfinite(values)):
            raise ValueError(
                f"features: expected finite numbers, got NaN or Inf in {name!r}: wrong network parameters?"
            )
    return features


def _given_moments(path: str) -> tuple[dict[str, Moments], bool]:
    """Returns the moments in a file of statistics by name of their features, and whether the file has images.

    Raises:
        ValueError: the file is missing or damaged, or moments have wrong shapes or are not finite.
    """
    found: dict[str, Moments] = {}
    try:
        with np.load(path) as file:
            for name, mu, sigma in ((POOLED, "mu", "sigma"), (SPATIAL, "mu_s", "sigma_s")):
                if mu in file and sigma in file:
                    mean, covariance = file[mu], file[sigma]
                    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                        raise ValueError(f"{mu} {mean.shape} and {sigma} {covariance.shape}")
                    if not np.all(np.isfinite(mean)) or not np.all(np.isfinite(covariance)):
                        raise ValueError(f"NaN or Inf in {mu} or {sigma}")
                    found[name] = mean, covariance
            return found, IMAGES in file.files
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"statistics: expected an .npz file with finite moments, got {path}: {error}") from error


def _counted(images: str, least: int) -> int:
    """Returns the number of images in a file; ValueError for fewer than `least`."""
    count = image_count(images)
    if count < least:
        raise ValueError(f"images: expected at least {least} in {images}, got {count}")
    return count


def _labels(images: str) -> np.ndarray | None:
    """Returns the labels, (N,) integers, or None if the file has none; ValueError for another shape or dtype."""
    count = image_count(images)
    try:
        with np.load(images) as file:
            labels = file[LABELS] if LABELS in file else None
        if labels is not None and (labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer)):
            raise ValueError(f"{labels.dtype} {labels.shape}")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"images: expected {LABELS} of integers {(count,)} in {images}, got {error}") from error
    return labels
