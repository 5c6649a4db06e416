import numpy as np
import pytest
from PIL import Image

from gspn_jax.data import randaugment as ra
from tests.data import pictures

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def run(operation: str, level: float, image: np.ndarray = RAMP, *, increasing: bool = True, negative: bool = False):
    return pixels(ra.apply(Image.fromarray(image), operation, level, increasing=increasing, negative=negative))


GRADED = [name for name in ra.OPERATIONS if name not in ("autocontrast", "equalize", "invert")]


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("operation", [name for name in GRADED if name != "posterize"])
def test_level_zero_changes_nothing(operation, negative):
    np.testing.assert_array_equal(run(operation, 0, negative=negative), RAMP)


def test_the_set_is_the_fifteen_of_the_recipe():
    assert len(ra.OPERATIONS) == len(set(ra.OPERATIONS)) == 15


@pytest.mark.parametrize(
    ("operation", "level", "increasing", "negative", "expected"),
    [
        ("rotate", 9, True, False, 27.0),
        ("rotate", 10, True, True, -30.0),
        ("shear_x", 5, True, False, 0.15),
        ("shear_y", 9, True, True, -0.27),
        ("translate_x", 10, True, False, 0.45),
        ("translate_y", 4, True, True, -0.18),
        ("posterize", 0, True, False, 4),
        ("posterize", 9, True, False, 1),
        ("posterize", 10, True, False, 0),
        ("posterize", 9, False, False, 3),
        ("solarize", 0, True, False, 256),
        ("solarize", 9, True, False, 26),
        ("solarize", 10, True, False, 0),
        ("solarize", 9, False, False, 230),
        ("solarize_add", 9, True, False, 99),
        ("solarize_add", 10, True, False, 110),
        ("colour", 9, True, False, 1.81),
        ("contrast", 9, True, True, 0.19),
        ("brightness", 10, True, True, 0.1),
        ("sharpness", 5, False, False, 1.0),
        ("sharpness", 0, False, False, 0.1),
    ],
)
def test_amounts(operation, level, increasing, negative, expected):
    assert ra.amount(operation, level, increasing=increasing, negative=negative) == pytest.approx(expected)


def test_posterize_keeps_the_high_bits():
    np.testing.assert_array_equal(run("posterize", 0), RAMP.astype(int) // 16 * 16)
    np.testing.assert_array_equal(run("posterize", 9), np.where(RAMP >= 128, 128, 0))
    assert run("posterize", 10).max() == 0
    np.testing.assert_array_equal(pixels(ra.posterize(Image.fromarray(RAMP), 8)), RAMP)


def test_solarize_inverts_from_the_threshold_up():
    np.testing.assert_array_equal(run("solarize", 5), np.where(RAMP < 128, RAMP, 255 - RAMP.astype(int)))
    np.testing.assert_array_equal(run("solarize", 10), 255 - RAMP.astype(int))


def test_solarize_add_brightens_the_dark_half():
    np.testing.assert_array_equal(run("solarize_add", 10), np.where(RAMP < 128, RAMP.astype(int) + 110, RAMP))


def test_invert_autocontrast_equalize():
    np.testing.assert_array_equal(run("invert", 3), 255 - RAMP.astype(int))
    narrow = 100 + RAMP // 8
    stretched = run("autocontrast", 3, narrow)
    assert stretched.min() == 0 and stretched.max() == 255
    np.testing.assert_allclose(stretched, (narrow.astype(int) - 100) * 255 / 31, atol=1)
    counts = np.bincount(run("equalize", 3, (RAMP.astype(int) ** 2 // 255).astype(np.uint8))[..., 0].ravel() // 64)
    assert counts.min() > 48 and counts.max() < 80  # a quarter of the pixels in each quarter of the range


def test_enhancers_pull_away_from_grey_mean_black_and_blur():
    colourful = pictures.gradient(16, 16, shade=90)
    grey = pixels(Image.fromarray(colourful).convert("L"))[..., None]
    faded = run("colour", 10, colourful, negative=True)  # a tenth of the colour is left
    np.testing.assert_allclose(faded, 0.9 * grey + 0.1 * colourful, atol=1.01)
    np.testing.assert_allclose(run("brightness", 10, negative=True), 0.1 * RAMP, atol=1)
    np.testing.assert_allclose(run("brightness", 5), np.clip(1.45 * RAMP, 0, 255), atol=1)
    np.testing.assert_allclose(run("contrast", 5, negative=True), 0.55 * RAMP + 0.45 * 128, atol=1.5)
    edge = np.repeat(np.where(np.arange(16) < 8, 60, 180), 16).reshape(16, 16).T.astype(np.uint8)
    edge = edge[..., None].repeat(3, axis=2)
    sharp, smooth = run("sharpness", 9, edge)[8, :, 0], run("sharpness", 9, edge, negative=True)[8, :, 0]
    assert sharp[7] < 60 and sharp[8] > 180 and 60 < smooth[7] < smooth[8] < 180


def spot(row: int, column: int, side: int = 41) -> np.ndarray:
    image = np.zeros((side, side, 3), np.uint8)
    image[row - 1 : row + 2, column - 1 : column + 2] = 255
    return image


def centre_of(image: np.ndarray) -> tuple[float, float]:
    """Returns the position of the white spot; grey from the edges is below the threshold."""
    rows, columns = np.nonzero(image[..., 2] > 150)
    return rows.mean(), columns.mean()


@pytest.mark.parametrize(
    ("operation", "level", "row", "column", "expected"),
    [
        ("translate_x", 10, 20, 30, (20, 30 - 0.45 * 41)),
        ("translate_y", 10, 30, 20, (30 - 0.45 * 41, 20)),
        ("shear_x", 10, 30, 25, (30, 25 - 0.3 * 30)),
        ("shear_y", 10, 25, 30, (25 - 0.3 * 30, 30)),
        # A turn by 30 degrees counter-clockwise about (20, 20) moves a spot on the right upwards.
        ("rotate", 10, 20, 34, (20 - 14 * 0.5, 20 + 14 * 0.866)),
    ],
)
def test_geometry_goes_the_way_it_says(operation, level, row, column, expected):
    got = centre_of(run(operation, level, spot(row, column)))
    assert got == pytest.approx(expected, abs=0.7)
    back = centre_of(run(operation, level, spot(*(round(number) for number in expected)), negative=True))
    assert back == pytest.approx((row, column), abs=1.2)


def test_edges_come_in_grey():
    moved = run("translate_x", 10, np.full((20, 20, 3), 255, np.uint8))
    np.testing.assert_array_equal(moved[:, -1], np.broadcast_to(ra.FILL, (20, 3)))
    np.testing.assert_array_equal(moved[:, 0], 255)
    turned = run("rotate", 10, np.full((20, 20, 3), 255, np.uint8))
    np.testing.assert_array_equal(turned[[0, 0, -1, -1], [0, -1, 0, -1]], np.broadcast_to(ra.FILL, (4, 3)))


def test_operations_are_chosen_alike_and_half_of_them_carried_out(monkeypatch):
    calls = []

    def record(image, operation, level, *, increasing, negative):
        calls.append((operation, level, negative))
        return image

    monkeypatch.setattr(ra, "apply", record)
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (4, 4))
    for _ in range(6000):
        ra.randaugment(image, rng, magnitude=9, std=0.5, increasing=True, operations=2)
    names, levels, signs = zip(*calls, strict=True)
    assert len(calls) / 12000 == pytest.approx(0.5, abs=0.015)
    assert [names.count(name) / len(calls) for name in ra.OPERATIONS] == pytest.approx([1 / 15] * 15, abs=0.012)
    assert np.mean(signs) == pytest.approx(0.5, abs=0.02)
    # Levels are normal with mean 9 and deviation 0.5, clipped at 10 (two deviations up).
    assert max(levels) == 10 and np.mean(np.array(levels) == 10) == pytest.approx(0.0228, abs=0.008)
    assert np.median(levels) == pytest.approx(9, abs=0.03)
    assert np.mean(np.array(levels) < 8.5) == pytest.approx(0.1587, abs=0.015)


def test_no_operations_or_none_carried_out_leave_the_image():
    image = Image.fromarray(RAMP)
    same = ra.randaugment(image, np.random.default_rng(0), magnitude=9, std=0.5, increasing=True, operations=0)
    assert same is image
