import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.special

from gspn_jax.evaluation.frechet import RunningInceptionScore, RunningMoments, frechet_distance, precision_and_recall


def draw(count, features, seed, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, features)) @ rng.normal(size=(features, features)) + offset


def moments_of(features):
    running = RunningMoments(features.shape[1])
    for part in np.array_split(features, 7):
        running.add(part)
    return running.moments()


def test_running_moments_far_from_zero():
    features = draw(500, 6, 0, offset=1e4)
    mean, covariance = moments_of(features)
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [300, 12])
def test_frechet_distance_is_that_by_a_matrix_root(count):
    """Includes fewer samples than features, whose covariance is singular."""
    one, other = (np.cov(draw(count, 16, seed), rowvar=False) for seed in (1, 2))
    means = draw(2, 16, 3)
    root = np.real(scipy.linalg.sqrtm(one @ other))
    want = np.sum((means[0] - means[1]) ** 2) + np.trace(one + other - 2 * root)
    assert frechet_distance((means[0], one), (means[1], other)) == pytest.approx(want, rel=1e-6)
    assert frechet_distance((means[0], one), (means[0], one)) == pytest.approx(0, abs=1e-6 * np.trace(one))


def test_inception_score_is_that_by_scipy():
    logits = 3 * draw(205, 8, 4)
    shares = scipy.special.softmax(logits, axis=1)
    want = [
        np.exp(scipy.special.rel_entr(part, part.mean(axis=0)).sum(axis=1).mean())
        for part in np.array_split(shares, 10)
    ]
    running = RunningInceptionScore(len(logits))
    for part in np.array_split(logits, 4):
        running.add(part)
    assert running.score() == pytest.approx((np.mean(want), np.std(want)), rel=1e-12)


def test_precision_and_recall_are_those_by_scipy():
    reference, samples = draw(60, 4, 5), draw(45, 4, 5)[:, ::-1] * 0.7

    def near(points, centres):
        own = np.sort(scipy.spatial.distance.cdist(centres, centres), axis=1)[:, 3]
        return (scipy.spatial.distance.cdist(points, centres) <= own).any(axis=1).mean()

    want = near(samples, reference), near(reference, samples)
    assert precision_and_recall(reference, samples, block=16) == pytest.approx(want)
    assert 0 < want[0] < 1 and 0 < want[1] < 1
    assert precision_and_recall(reference, reference) == (1, 1)
    assert precision_and_recall(reference, reference + 1e3) == (0, 0)


def test_bad_arguments():
    running = RunningMoments(3)
    with pytest.raises(ValueError, match=r"batch: expected shape \(B, 3\), got \(2, 4\)"):
        running.add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="batch: expected finite"):
        running.add(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="count: expected at least 2 samples, got 0"):
        running.moments()
    with pytest.raises(ValueError, match="other: expected 3 features, got 2"):
        frechet_distance((np.zeros(3), np.eye(3)), (np.zeros(2), np.eye(2)))
    with pytest.raises(ValueError, match="count: expected at least 10 images, one for each split, got 5"):
        RunningInceptionScore(5)
    score = RunningInceptionScore(10)
    with pytest.raises(ValueError, match=r"logits: expected \(B, classes\) of 10 images in all, got \(11, 3\)"):
        score.add(np.zeros((11, 3)))
    with pytest.raises(ValueError, match="count: expected 10 images, got 0"):
        score.score()
    with pytest.raises(ValueError, match="samples: expected more than 3 rows of 4 features"):
        precision_and_recall(np.zeros((9, 4)), np.zeros((3, 4)))
