"""Prepares single pictures (arrays, Pillow images or files) as the evaluation pipeline prepares its images."""

import os
from typing import Any

import numpy as np
from PIL import Image

from gspn_jax.data import crops
from gspn_jax.data.decoding import CorruptImage, open_picture, read_file, upright


def read_picture(image: Any) -> Image.Image:
    """Returns a picture, turned upright by its EXIF data.

    Args:
        image: uint8 array (H, W, 3) or (H, W), Pillow image, or path of an image file.

    Raises:
        CorruptImage: it is no image; the message does not name it.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return open_picture(read_file(image), exif_rotation=True)
        except OSError as error:
            raise CorruptImage(f"cannot be read ({error.strerror or error})") from error
    if isinstance(image, Image.Image):
        return upright(image)
    array = np.asarray(image)
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_picture or not array.size:
        raise CorruptImage(f"expected uint8 (H, W, 3) or (H, W), got {array.dtype} {array.shape}")
    return Image.fromarray(array)


def prepare_picture(picture: Image.Image, size: int, resize: int | None = None) -> np.ndarray:
    """Returns a picture resized and centre cropped: uint8 (size, size, 3).

    Args:
        picture: of any mode and size.
        size: side of the result, in pixels.
        resize: short side before the crop; None for size / 0.875, except that a picture of the right size is kept.

    Raises:
        CorruptImage: the picture cannot be decoded.
    """
    box = crops.centre_box((picture.height, picture.width), (size, size), resize)
    return np.asarray(crops.resample(picture, box, (size, size)))
