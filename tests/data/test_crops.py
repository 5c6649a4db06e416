import io
import math

import numpy as np
import pytest
from PIL import Image

from gspn_jax.data import crops, decoding
from tests.data import pictures

BICUBIC = Image.Resampling.BICUBIC


def textured(height: int, width: int) -> np.ndarray:
    """Returns smoothed noise, on which resampling errors show."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), BICUBIC))


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (256, 256), (257, 999), (120, 90)])
def test_centre_box_is_resize_then_centre_crop(shape):
    picture = Image.fromarray(textured(*shape))
    short = min(shape)
    resized = picture.resize((int(shape[1] * 256 / short), int(shape[0] * 256 / short)), BICUBIC)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))).astype(int)
    got = np.asarray(crops.resample(picture, crops.centre_box(shape, (224, 224), 256), (224, 224))).astype(int)
    assert np.abs(got - expected).max() <= 1
    np.testing.assert_array_equal(crops.centre_box(shape, (224, 224)), crops.centre_box(shape, (224, 224), 256))


def test_centre_box_numbers():
    # 400 x 600 to a short side of 256: 256 x 384, of which rows 16 to 240 and columns 80 to 304 are kept.
    assert crops.centre_box((400, 600), (224, 224), 256) == pytest.approx((125, 25, 475, 375))
    assert crops.centre_box((400, 600), (224, 224), 224) == pytest.approx((100, 0, 500, 400))
    assert crops.centre_box((8, 8), (8, 8)) == (0, 0, 8, 8)
    assert crops.centre_box((8, 8), (8, 8), 16) == pytest.approx((2, 2, 6, 6))
    # Not square: the picture covers the result with the same margin.
    assert crops.centre_box((100, 100), (50, 100), 50) == pytest.approx((0, 25, 100, 75))
    with pytest.raises(ValueError, match="resize: expected at least the image size 224, got 200"):
        crops.centre_box((400, 600), (224, 224), 200)


def test_random_boxes_have_the_right_areas_aspects_and_places():
    rng = np.random.default_rng(0)
    boxes = np.array([crops.random_box((400, 500), (0.08, 1.0), rng) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 500 and bottom.max() <= 400
    assert np.array_equal(boxes, np.round(boxes))
    share = (right - left) * (bottom - top) / (400 * 500)
    aspect = (right - left) / (bottom - top)
    assert share.min() > 0.078 and share.max() <= 1
    assert aspect.min() > 0.74 and aspect.max() < 1.345
    # Areas are uniform up to 0.6, which fits at every aspect ratio (a box of aspect 3/4 is then 400 high).
    small = share[share < 0.6]
    assert np.histogram(small, bins=4, range=(0.08, 0.6))[0] / len(small) == pytest.approx([0.25] * 4, abs=0.03)
    assert np.mean(np.log(aspect[share < 0.6])) == pytest.approx(0, abs=0.01)
    # Positions are uniform, as shares of the free room.
    free = (500 - (right - left) > 50) & (400 - (bottom - top) > 50)
    assert np.mean(left[free] / (500 - (right - left))[free]) == pytest.approx(0.5, abs=0.02)
    assert np.mean(top[free] / (400 - (bottom - top))[free]) == pytest.approx(0.5, abs=0.02)


def test_random_box_of_a_long_picture_is_the_largest_that_is_allowed():
    rng = np.random.default_rng(0)
    assert crops.random_box((30, 3000), (1.0, 1.0), rng) == (1480, 0, 1520, 30)
    assert crops.random_box((3000, 30), (1.0, 1.0), rng) == (0, 1480, 30, 1520)
    assert crops.random_box((1, 1), (0.08, 1.0), rng) == (0, 0, 1, 1)


def test_resample_takes_the_box():
    picture = Image.fromarray(pictures.gradient(256, 256))
    left = np.asarray(crops.resample(picture, (0, 128, 128, 256), (64, 64))).astype(int)
    assert left[..., 0].min() < 3 and left[..., 0].max() == pytest.approx(127, abs=2)  # red: x from 0 to 128
    assert left[..., 1].min() == pytest.approx(128, abs=2) and left[..., 1].max() > 252  # green: y from 128 to 256


@pytest.mark.parametrize("box", [(0, 0, 1200, 900), (150.5, 33.25, 1049.5, 800.75)])
def test_reduced_decoding_looks_the_same(box):
    data = pictures.jpeg(textured(903, 1207), quality=90)
    full = Image.open(io.BytesIO(data)).resize((96, 80), BICUBIC, box=box)
    picture = decoding.open_picture(data)
    got = np.asarray(crops.resample(picture, box, (80, 96))).astype(int)
    assert picture.width < 1207 // 2 + 2  # it really was decoded smaller
    error = got - np.asarray(full).astype(int)
    assert math.sqrt(np.mean(error**2)) < 1.5 and np.abs(error.mean()) < 0.2
    shifted = np.roll(got, 1, axis=1) - np.asarray(full).astype(int)
    assert math.sqrt(np.mean(shifted**2)) > 15  # the measure does see a shift by one pixel


def test_small_reductions_are_decoded_in_full():
    data = pictures.jpeg(textured(300, 400))
    picture = decoding.open_picture(data)
    crops.resample(picture, (0, 0, 400, 300), (112, 112))
    assert picture.size == (400, 300)


def test_shifted_moves_and_fills_with_black():
    image = np.arange(1, 13, dtype=np.uint8).reshape(3, 4, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(crops.shifted(image, 1, 0)[..., 0], [[2, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0]])
    np.testing.assert_array_equal(crops.shifted(image, 0, -2)[..., 0], [[0, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    np.testing.assert_array_equal(crops.shifted(image, -3, 1)[..., 0], [[0, 0, 0, 5], [0, 0, 0, 9], [0, 0, 0, 0]])
    assert crops.shifted(image, 9, 0).sum() == 0
    np.testing.assert_array_equal(crops.shifted(image, 0, 0), image)


def test_random_shift_reaches_every_place_alike():
    rng = np.random.default_rng(0)
    shifts = [crops.random_shift(1, rng) for _ in range(9000)]
    counts = [shifts.count((left, top)) for left in (-1, 0, 1) for top in (-1, 0, 1)]
    assert sum(counts) == 9000 and min(counts) > 900 and max(counts) < 1100
