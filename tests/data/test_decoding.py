"""Tests of image files: accepted files and EXIF orientation."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gspn_jax import data
from gspn_jax.data.decoding import decode, open_picture, read_file
from tests.data import pictures

UPRIGHT = pictures.gradient(20, 30)  # red grows with x, green with y
# Pixels that a camera stores for the upright image, by the value of the EXIF orientation.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),  # shown turned by 90 degrees clockwise
    7: np.rot90(UPRIGHT, 2).transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


def photograph(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(file, kind, exif=exif, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation_turns_images_upright(orientation: int, kind: str):
    image = np.asarray(decode(open_picture(photograph(orientation, kind), exif_rotation=True)))
    assert image.shape == UPRIGHT.shape
    np.testing.assert_allclose(image.astype(int), UPRIGHT, atol=4)
    plain = np.asarray(decode(open_picture(photograph(orientation, kind))))
    # Pillow turns TIFF files when it loads them.
    np.testing.assert_allclose(plain.astype(int), UPRIGHT if kind == "TIFF" else STORED[orientation], atol=4)


def test_batches_are_turned_if_asked(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "1.jpg").write_bytes(photograph(6))
    dataset = data.load("image_folder", str(tmp_path))
    for turn in (False, True):
        options: Any = dict(batch_size=1, image_size=(20, 30), num_threads=0, exif_rotation=turn)
        for batches in (
            data.training_batches(dataset.train, **options),
            data.evaluation_batches(dataset.test, **options),
        ):
            image = next(batches)["image"][0].astype(int)
            is_upright = np.abs(image - UPRIGHT).max() < 6
            assert is_upright == turn


def test_damaged_exif_data_leave_the_image_as_it_is():
    content = photograph(6)
    place = content.index(b"Exif\0\0") + 6
    image = decode(open_picture(content[:place] + b"\xff" * 8 + content[place + 8 :], exif_rotation=True))
    assert image.size == (20, 30)


def test_special_files_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):  # reading the pipe would wait for ever
        with pytest.raises(data.CorruptImage, match=r": expected a regular file, got a folder, pipe or device$"):
            read_file(tmp_path / name)
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(data.CorruptImage, match="loop.png: expected a regular file, got a loop of symbolic links"):
        read_file(tmp_path / "loop.png")
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "nothing.png")
