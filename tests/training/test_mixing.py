"""Mixup, cutmix and label smoothing against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.training.mixing import MixingOptions, box, mix, smooth_targets

CLASSES = 5


def batch(size: int = 6, height: int = 10, width: int = 14) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (size, height, width, 3), np.uint8), rng.integers(CLASSES, size=size).astype(np.int32)


def mixed(options: MixingOptions, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images, labels = batch()
    got = mix(jnp.asarray(images), jnp.asarray(labels), jax.random.key(seed), num_classes=CLASSES, options=options)
    return np.asarray(got[0]), np.asarray(got[1])


def numpy_targets(smoothing: float) -> np.ndarray:
    targets = np.full((6, CLASSES), smoothing / CLASSES, np.float32)
    targets[np.arange(6), batch()[1]] += 1 - smoothing
    return targets


def test_without_mixing_images_stay_and_targets_are_smoothed():
    images, targets = mixed(MixingOptions(label_smoothing=0.1))
    np.testing.assert_array_equal(images, batch()[0])
    np.testing.assert_allclose(targets, numpy_targets(0.1), rtol=1e-6)
    np.testing.assert_allclose(smooth_targets(jnp.asarray([2]), 4, 0.2)[0], [0.05, 0.05, 0.85, 0.05], rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_mixup_blends_images_and_targets_by_one_share(seed: int):
    images, targets = mixed(MixingOptions(mixup=0.8, label_smoothing=0.1), seed)
    own = batch()[0].astype(np.float32)
    other, plain = own[::-1], numpy_targets(0.1)
    differ = np.abs(own - other) > 50
    shares = (images - other)[differ] / (own - other)[differ]
    share = np.median(shares)
    assert 0 < share < 1
    np.testing.assert_allclose(shares, share, atol=1e-4)
    np.testing.assert_allclose(targets, share * plain + (1 - share) * plain[::-1], atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_cutmix_pastes_one_box_and_weighs_targets_by_its_pixels(seed: int):
    images, targets = mixed(MixingOptions(cutmix=1.0, label_smoothing=0.1), seed)
    own = batch()[0].astype(np.float32)
    pasted = np.any(images != own, axis=(0, 3))
    rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
    assert pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one full rectangle
    assert pasted.sum() == len(rows) * len(columns)
    np.testing.assert_array_equal(images[:, pasted], own[::-1][:, pasted])
    np.testing.assert_array_equal(images[:, ~pasted], own[:, ~pasted])
    share, plain = 1 - pasted.mean(), numpy_targets(0.1)
    np.testing.assert_allclose(targets, share * plain + (1 - share) * plain[::-1], atol=1e-6)


def test_box_matches_numpy_also_at_the_border():
    height, width = 20, 30
    for share, row, column in ((0.75, 0.5, 0.5), (0.36, 0.02, 0.99), (0.0, 0.5, 0.5), (1.0, 0.3, 0.3)):
        got = np.asarray(box(jnp.float32(share), jnp.asarray([row, column], jnp.float32), height, width))
        cut_h, cut_w = int(height * np.sqrt(1 - share)), int(width * np.sqrt(1 - share))
        middle_h, middle_w = int(row * height), int(column * width)
        want = np.zeros((height, width), bool)
        want[
            max(middle_h - cut_h // 2, 0) : min(middle_h + cut_h // 2, height),
            max(middle_w - cut_w // 2, 0) : min(middle_w + cut_w // 2, width),
        ] = True
        np.testing.assert_array_equal(got, want)


def test_switch_and_probability_are_the_shares_of_batches():
    own = batch()[0].astype(np.float32)
    options = MixingOptions(mixup=0.8, cutmix=1.0, probability=0.75, switch=0.5)
    images, labels = (jnp.asarray(part) for part in batch())
    one = jax.jit(lambda key: mix(images, labels, key, num_classes=CLASSES, options=options)[0])
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for key in jax.random.split(jax.random.key(0), 200):
        got = np.asarray(one(key))
        if np.array_equal(got, own):
            kinds["none"] += 1
        else:
            kinds["cutmix" if np.isin(got, np.unique(own)).all() and np.any(got == own) else "mixup"] += 1
    assert 35 <= kinds["none"] <= 80 and 50 <= kinds["cutmix"] <= 100 and 50 <= kinds["mixup"] <= 100, kinds


@pytest.mark.parametrize(
    "change",
    [
        {"mixup": -0.1},
        {"cutmix": -1},
        {"cutmix": float("nan")},
        {"mixup": float("inf")},
        {"probability": 1.5},
        {"label_smoothing": -0.1},
    ],
)
def test_bad_options_are_named(change: dict):
    with pytest.raises(ValueError, match=next(iter(change))):
        MixingOptions(**change)
