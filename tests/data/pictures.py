"""Writes small image folders for the tests."""

import io
import pathlib

import numpy as np
from PIL import Image

SIZES = ((48, 64), (64, 48), (40, 40), (100, 30))  # height, width


def gradient(height: int, width: int, shade: int = 0) -> np.ndarray:
    """Returns a smooth picture that JPEG and resampling hardly change: red grows with x, green with y."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, shade)], axis=2).round().astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def write_folder(root: pathlib.Path, *, train: int = 6, val: int = 3, classes: int = 3) -> pathlib.Path:
    """Writes root/{train,val}/class_N/NN.jpg in several sizes; the blue value encodes the class."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = SIZES[(number + label) % len(SIZES)]
                (folder / f"{number:02}.jpg").write_bytes(jpeg(gradient(height, width, shade=60 * label)))
    return root


def truncate(path: pathlib.Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
