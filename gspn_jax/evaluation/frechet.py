"""Scores of generated images, computed from features: Frechet distances, inception score, precision and recall.

Moments and inception scores are running sums in float64, so memory does not grow with the number of images. Precision
and recall keep the features and compare them block by block.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

Moments = tuple[np.ndarray, np.ndarray]  # mean (D,) and covariance (D, D), float64


@dataclasses.dataclass
class RunningMoments:
    """Mean and covariance of features that are added in batches.

    Attributes:
        features: D, the length of a feature vector.
        count: number of samples so far.
    """

    features: int

    def __post_init__(self):
        self.count = 0
        self._shift: np.ndarray | None = None  # mean of the first batch; centred sums lose fewer digits
        self._sum = np.zeros(self.features)
        self._products = np.zeros((self.features, self.features))

    def add(self, batch: np.ndarray) -> None:
        """Adds a batch.

        Args:
            batch: (B, features), any float dtype.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        batch = np.asarray(batch, np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.features:
            raise ValueError(f"batch: expected shape (B, {self.features}), got {batch.shape}")
        if not np.all(np.isfinite(batch)):
            raise ValueError("batch: expected finite features, got NaN or Inf")
        if self._shift is None and len(batch):
            self._shift = batch.mean(axis=0)
        if len(batch):
            batch = batch - self._shift
            self.count += len(batch)
            self._sum += batch.sum(axis=0)
            self._products += batch.T @ batch

    def moments(self) -> Moments:
        """Returns mean (D,) and covariance (D, D), float64, of all batches; the covariance is divided by count - 1.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2 or self._shift is None:
            raise ValueError(f"count: expected at least 2 samples, got {self.count}")
        mean = self._sum / self.count
        covariance = (self._products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return mean + self._shift, covariance


def frechet_distance(one: Moments, other: Moments) -> float:
    """Returns |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two normal distributions (arXiv 1706.08500).

    Raises:
        ValueError: the distributions differ in their number of features.
    """
    (mean, covariance), (other_mean, other_covariance) = one, other
    if mean.shape != other_mean.shape:
        raise ValueError(f"other: expected {mean.shape[0]} features, got {other_mean.shape[0]}")
    # The root of S1 S2 has the same trace as the root of R S2 R, which is symmetric; R is the root of S1.
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ other_covariance @ root)
    trace = np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(np.maximum(shared, 0)).sum()
    return float(np.sum((mean - other_mean) ** 2) + trace)


class RunningInceptionScore:
    """Inception score exp E KL(p(y | x) || p(y)) (arXiv 1606.03498) of images that are added in batches."""

    def __init__(self, count: int, splits: int = 10):
        """Starts with no image.

        Args:
            count: number of images that will be added.
            splits: number of parts of about equal size, in order; each part gets a score.

        Raises:
            ValueError: splits is less than 1, or count is less than splits.
        """
        if not 1 <= splits <= count:
            raise ValueError(f"count: expected at least {splits} images, one for each split, got {count}")
        self._ends = np.cumsum([len(part) for part in np.array_split(np.arange(count), splits)])
        self._seen = 0
        self._shares: list[Any] = [0.0] * splits  # sums of p(y | x) of each part
        self._negative_entropies = np.zeros(splits)

    def add(self, logits: np.ndarray) -> None:
        """Adds the logits (B, classes) of the next images; ValueError for another shape or more than `count` images."""
        if logits.ndim != 2 or self._seen + len(logits) > self._ends[-1]:
            raise ValueError(f"logits: expected (B, classes) of {self._ends[-1]} images in all, got {logits.shape}")
        logits = np.asarray(logits, np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_shares = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        parts = np.searchsorted(self._ends, self._seen + np.arange(len(logits)), side="right")
        for part in np.unique(parts):
            rows = log_shares[parts == part]
            self._shares[part] = self._shares[part] + np.exp(rows).sum(axis=0)
            self._negative_entropies[part] += (np.exp(rows) * rows).sum()
        self._seen += len(logits)

    def score(self) -> tuple[float, float]:
        """Returns mean and standard deviation of the parts' scores; ValueError if images are missing."""
        if self._seen != self._ends[-1]:
            raise ValueError(f"count: expected {self._ends[-1]} images, got {self._seen}")
        scores = []
        for shares, negative_entropy, count in zip(
            self._shares, self._negative_entropies, np.diff(self._ends, prepend=0), strict=True
        ):
            mean = shares / count
            scores.append(np.exp(negative_entropy / count - (mean * np.log(np.maximum(mean, 1e-300))).sum()))
        return float(np.mean(scores)), float(np.std(scores))


def precision_and_recall(
    reference: np.ndarray, samples: np.ndarray, *, neighbours: int = 3, block: int = 1000
) -> tuple[float, float]:
    """Returns the share of samples near the reference and the share of the reference near samples (arXiv 1904.06991).

    A point is near a set if it lies in the ball about some member whose radius is the distance to that member's k-th
    neighbour in the set.

    Args:
        reference, samples: (N, D) and (M, D), more than `neighbours` rows each.
        neighbours: k.
        block: number of rows of the distance matrix in memory at a time.

    Raises:
        ValueError: too few rows, or another number of features.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if features.ndim != 2 or len(features) <= neighbours or features.shape[1] != reference.shape[1]:
            raise ValueError(
                f"{name}: expected more than {neighbours} rows of {reference.shape[-1]} features, got {features.shape}"
            )
    radii = [_radii(features, neighbours, block) for features in (reference, samples)]
    precision = _share_within(samples, reference, radii[0], block)
    return precision, _share_within(reference, samples, radii[1], block)


def _radii(features: np.ndarray, neighbours: int, block: int) -> np.ndarray:
    """Returns the squared distance of each row to its k-th neighbour other than itself, (N,)."""
    nearest = [np.partition(part, neighbours, axis=1)[:, neighbours] for part in _distances(features, features, block)]
    return np.concatenate(nearest)


def _share_within(points: np.ndarray, centres: np.ndarray, radii: np.ndarray, block: int) -> float:
    """Returns the share of points that lie in some ball; radii are squared."""
    within = [np.any(part <= radii[None], axis=1) for part in _distances(points, centres, block)]
    return float(np.concatenate(within).mean())


def _distances(rows: np.ndarray, columns: np.ndarray, block: int) -> Iterator[np.ndarray]:
    """Yields squared distances of `block` rows at a time to all columns."""
    columns = np.asarray(columns, np.float64)
    squares = np.sum(columns**2, axis=1)
    for start in range(0, len(rows), block):
        part = np.asarray(rows[start : start + block], np.float64)
        distances = np.sum(part**2, axis=1)[:, None] + squares[None] - 2 * part @ columns.T
        yield np.maximum(distances, 0)
