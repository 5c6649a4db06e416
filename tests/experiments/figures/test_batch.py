from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.classifier import get_config
from experiments.contact_sheet import CAPTION_HEIGHT, GAP, contact_sheet
from experiments.figures.batch import draw
from gspn_jax import data
from tests.data import pictures


def test_sheet_shows_every_image_where_it_belongs():
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), np.uint8)  # drawn three times as large
    sheet = np.asarray(contact_sheet(images, ["a", "b", "c", "d", "e" * 100]))
    columns = 2  # 5 images of 40 x 60 are nearly square in two columns
    for number, image in enumerate(images):
        top = GAP + number // columns * (120 + CAPTION_HEIGHT + GAP)
        left = GAP + number % columns * (180 + GAP)
        np.testing.assert_array_equal(sheet[top : top + 120 : 3, left : left + 180 : 3], image)
        np.testing.assert_array_equal(sheet[top + 2 : top + 120 : 3, left + 2 : left + 180 : 3], image)
        caption = sheet[top + 120 : top + 120 + CAPTION_HEIGHT, left : left + 180]
        assert caption.min() < 100 and caption.max() == 255


def test_it_draws_what_training_gets(tmp_path):
    pictures.write_folder(tmp_path / "photos")
    config: Any = get_config("gspn_t")
    config.data.path = str(tmp_path / "photos")
    config.data.image_size = 96
    config.batch_size = 4
    message = draw(config, output=str(tmp_path / "sheet.png"), count=3, batch=2)
    assert message == f"{tmp_path / 'sheet.png'}: 3 of the 4 images of batch 2"
    stream = data.training_batches(
        data.load("image_folder", config.data.path).train,
        batch_size=4,
        image_size=96,
        augmentation=data.Augmentation(**config.augmentation.to_dict()),
        num_threads=0,
    )
    expected = [next(stream) for _ in range(3)][2]["image"]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    np.testing.assert_array_equal(sheet[GAP : GAP + 96, GAP : GAP + 96], expected[0])
    np.testing.assert_array_equal(sheet[GAP : GAP + 96, 2 * GAP + 96 : 2 * GAP + 192], expected[1])


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected at least 1 image of batch 0 or later, got 0, 0"):
        draw(get_config("digits"), output=str(tmp_path / "sheet.png"), count=0, batch=0)
