import dataclasses

import numpy as np
import pytest
from PIL import Image

from gspn_jax import data
from gspn_jax.data import augmentation as module
from gspn_jax.data.augmentation import Augmentation, augment, color_jitter, erase
from tests.data import pictures


def run(picture, augmentation: Augmentation, seed: int = 0, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    out = np.zeros((*size, 3), np.uint8)
    augment(picture, size, augmentation, np.random.default_rng(seed), out)
    return out


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(1, 256, (*shape, 3), np.uint8)


def test_nothing_by_default():
    image = noise(16, 16)
    np.testing.assert_array_equal(run(image, Augmentation()), image)


def test_flip_mirrors_every_other_image():
    image = noise(16, 16)
    results = [run(image, Augmentation(flip=True), seed) for seed in range(2000)]
    mirrored = [np.array_equal(result, image[:, ::-1]) for result in results]
    assert all(m or np.array_equal(result, image) for m, result in zip(mirrored, results, strict=True))
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.035)


def test_padded_crop_moves_by_up_to_the_padding():
    image = noise(8, 8)
    seen = set()
    for seed in range(600):
        result = run(image, Augmentation(crop="padded", crop_padding=2), seed, (8, 8))
        black = np.all(result == 0, axis=2)
        rows, columns = np.flatnonzero(~black.all(axis=1)), np.flatnonzero(~black.all(axis=0))
        top, left = 8 - len(rows) if rows[0] else len(rows) - 8, 8 - len(columns) if columns[0] else len(columns) - 8
        seen.add((top, left))
        window = image[max(0, -top) : 8 - max(0, top), max(0, -left) : 8 - max(0, left)]
        np.testing.assert_array_equal(result[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], window)
    assert seen == {(top, left) for top in range(-2, 3) for left in range(-2, 3)}


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(crop="padded", crop_padding=3, flip=True, erasing=0.5), Augmentation(flip=True), Augmentation()],
)
def test_arrays_and_pillow_images_give_the_same(augmentation):
    image = noise(16, 16)
    for seed in range(40):
        np.testing.assert_array_equal(
            run(image, augmentation, seed), run(Image.fromarray(image), augmentation, seed), err_msg=str(seed)
        )


def test_resized_crop_shows_part_of_the_picture_at_full_size():
    picture = pictures.gradient(300, 400)
    spans = []
    for seed in range(200):
        result = run(picture, Augmentation(crop="resized", crop_scale=(0.25, 0.25)), seed, (32, 32)).astype(int)
        across = (result[0, -1, 0] - result[0, 0, 0]) / 255 * 400 * 32 / 31
        down = (result[-1, 0, 1] - result[0, 0, 1]) / 255 * 300 * 32 / 31
        spans.append(across * down / (300 * 400))
    assert np.mean(spans) == pytest.approx(0.25, abs=0.01) and np.std(spans) < 0.02


def test_erasing_rate_area_and_noise():
    grey = np.full((64, 64, 3), 10, np.uint8)
    results = [run(grey, Augmentation(erasing=0.25), seed, (64, 64)) for seed in range(2000)]
    touched = [result for result in results if np.any(result != 10)]
    assert len(touched) / len(results) == pytest.approx(0.25, abs=0.03)
    shares, aspects = [], []
    for result in touched:
        changed = np.any(result != 10, axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        shares.append(height * width / 4096)
        aspects.append(height / width)
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.98  # one full box
    assert 0.015 < min(shares) and max(shares) < 0.345
    # Areas are uniform between 2% and 33%, except that long, large boxes do not fit.
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)
    assert np.mean(np.log(aspects)) == pytest.approx(0, abs=0.08)
    assert 0.25 < min(aspects) < 0.4 and 2.5 < max(aspects) < 4


def test_erasing_noise_has_the_statistics_of_imagenet():
    image = np.zeros((200, 200, 3), np.uint8)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(20):
        image[:] = 0
        erase(image, rng)
        values.append(image[np.any(image > 0, axis=2)])
    values = np.concatenate(values).astype(float)
    # Clipping to 0..255 reduces the spread a little.
    np.testing.assert_allclose(values.mean(axis=0), data.IMAGENET_MEAN, atol=1.5)
    np.testing.assert_allclose(values.std(axis=0), data.IMAGENET_STD, atol=2.5)


def test_erasing_leaves_images_alone_that_are_too_small():
    image = np.full((1, 1, 3), 7, np.uint8)
    erase(image, np.random.default_rng(0))
    assert image.tolist() == [[[7, 7, 7]]]


def test_color_jitter_factors():
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    values = [np.asarray(color_jitter(grey, 0.4, np.random.default_rng(seed)))[0, 0, 0] for seed in range(1500)]
    # On uniform grey, only brightness has an effect: its factor is uniform from 0.6 to 1.4.
    assert 60 <= min(values) <= 62 and 138 <= max(values) <= 140
    assert np.mean(values) == pytest.approx(100, abs=2)
    assert np.std(values) == pytest.approx(80 / 12**0.5, abs=1.5)
    colourful = Image.new("RGB", (4, 4), (200, 100, 50))
    spreads = []
    for seed in range(800):
        pixel = np.asarray(color_jitter(colourful, 0.4, np.random.default_rng(seed)))[0, 0].astype(float)
        spreads.append((pixel[1] - pixel[2]) / pixel.mean())
    assert np.std(spreads) > 0.08  # saturation changes as well


def test_color_jitter_only_where_randaugment_is_off(monkeypatch):
    used = []
    monkeypatch.setattr(module, "color_jitter", lambda image, *_: used.append("jitter") or image)
    monkeypatch.setattr(module, "randaugment", lambda image, *_, **__: used.append("randaugment") or image)
    run(noise(16, 16), Augmentation(color_jitter=0.4))
    run(noise(16, 16), Augmentation(color_jitter=0.4, randaugment_magnitude=9))
    assert used == ["jitter", "randaugment"]


def test_full_recipe_depends_on_the_generator_alone():
    recipe = Augmentation(crop="resized", flip=True, randaugment_magnitude=9, color_jitter=0.4, erasing=0.25)
    picture = pictures.gradient(50, 70)
    results = [run(picture, recipe, seed) for seed in range(20)]
    for seed, result in enumerate(results):
        np.testing.assert_array_equal(run(picture, recipe, seed), result)
    assert len({result.tobytes() for result in results}) == 20


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crop", "random", r"crop: expected one of .* got 'random'"),
        ("crop_scale", (0.0, 1.0), r"crop_scale: expected 0 < smallest"),
        ("crop_scale", (0.9, 0.5), r"crop_scale: .*got \(0.9, 0.5\)"),
        ("crop_padding", -1, "crop_padding: expected at least 0, got -1"),
        ("randaugment_magnitude", 11, "randaugment_magnitude: expected 0 to 10.0, got 11"),
        ("randaugment_std", -0.5, "randaugment_std"),
        ("randaugment_ops", -1, "randaugment_ops"),
        ("color_jitter", -0.1, "color_jitter"),
        ("erasing", 1.5, "erasing: expected 0 to 1, got 1.5"),
        ("erasing", float("nan"), "erasing: expected 0 to 1, got nan"),
        ("color_jitter", "strong", "color_jitter: expected 0 to inf, got 'strong'"),
        ("crop_padding", 1.5, "crop_padding: expected an integer, got 1.5"),
        ("crop_scale", "all", "crop_scale: .*got 'all'"),
        ("flip", "yes", "flip: expected True or False, got 'yes'"),
    ],
)
def test_bad_values_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Augmentation(), **{field: value})
