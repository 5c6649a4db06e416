"""Crops: the centre for evaluation, random boxes for training."""

import math

import numpy as np
from PIL import Image

from gspn_jax.data.decoding import decode

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the image
Size = tuple[int, int]  # height, width

_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_MARGIN = 0.875  # side of the centre crop / short side of the resized image


def centre_box(picture: Size, size: Size, resize: int | None = None) -> Box:
    """Returns the box that, resampled to `size`, equals resizing the short side and cropping the centre.

    Args:
        picture: height and width of the image.
        size: height and width of the result.
        resize: short side after resizing and before cropping (256 for 224). None: size / 0.875, but an image of the
            right size is taken whole. If `size` is not square, the resized image covers it with the same margin.

    Raises:
        ValueError: `resize` is less than the short side of `size`.
    """
    (height, width), (rows, columns) = picture, size
    short = min(size)
    if resize is None:
        if picture == size:
            return 0.0, 0.0, float(width), float(height)
        resize = math.floor(short / _MARGIN)
    if resize < short:
        raise ValueError(f"resize: expected at least the image size {short}, got {resize}")
    # Whole pixels, as if the resized image existed.
    cover = resize / short
    scale = max(rows * cover / height, columns * cover / width)
    new_height, new_width = max(rows, int(height * scale + 1e-6)), max(columns, int(width * scale + 1e-6))
    top, left = round((new_height - rows) / 2), round((new_width - columns) / 2)
    across, down = width / new_width, height / new_height
    return left * across, top * down, (left + columns) * across, (top + rows) * down


def random_box(picture: Size, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """Returns a box of random area (`scale`: shares of the image) and aspect ratio (3/4 to 4/3), uniform in position.

    If ten boxes in a row do not fit into the image, it is the largest centred box with an allowed aspect ratio.
    """
    height, width = picture
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            left, top = int(rng.integers(width - columns + 1)), int(rng.integers(height - rows + 1))
            return float(left), float(top), float(left + columns), float(top + rows)
    columns = min(width, max(1, round(height * _ASPECT[1])))
    rows = min(height, max(1, round(width / _ASPECT[0])))
    left, top = (width - columns) // 2, (height - rows) // 2
    return float(left), float(top), float(left + columns), float(top + rows)


def resample(picture: Image.Image, box: Box, size: Size) -> Image.Image:
    """Returns a box of an image resampled to `size`, bicubic with antialiasing, in RGB.

    Raises:
        CorruptImage: the image cannot be decoded.
    """
    width = picture.width
    reduction = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    decoded = decode(picture, reduction)
    halved = 2 ** round(math.log2(width / decoded.width))  # a JPEG may come at a fraction of its size
    box = (box[0] / halved, box[1] / halved, box[2] / halved, box[3] / halved)
    if box == (0.0, 0.0, size[1], size[0]) == (0.0, 0.0, decoded.width, decoded.height):
        return decoded
    return decoded.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def random_shift(padding: int, rng: np.random.Generator) -> tuple[int, int]:
    """Returns how far the window of a padded crop moves: (left, top), each from -padding to padding."""
    left, top = rng.integers(-padding, padding + 1, size=2).tolist()
    return left, top


def shifted(image: np.ndarray, left: int, top: int) -> np.ndarray:
    """Returns the image (H, W, 3) in a window of its size that begins at (left, top), black outside the image."""
    height, width, _ = image.shape
    rows, columns = max(0, height - abs(top)), max(0, width - abs(left))
    result = np.zeros_like(image)
    to_row, to_column = max(0, -top), max(0, -left)
    from_row, from_column = max(0, top), max(0, left)
    result[to_row : to_row + rows, to_column : to_column + columns] = image[
        from_row : from_row + rows, from_column : from_column + columns
    ]
    return result
