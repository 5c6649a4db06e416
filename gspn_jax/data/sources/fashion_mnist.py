"""Fashion-MNIST from its idx files (28x28 grey images of clothes, 60,000 + 10,000)."""

import gzip
import pathlib
import zlib

import numpy as np

from gspn_jax.data.sources.protocol import ArraySource, Dataset

CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# The folder of Debian's package dataset-fashion-mnist.
DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
_PREFIX = {"train": "train", "test": "t10k"}


def fashion_mnist(path: str | None = None) -> Dataset:
    """Opens Fashion-MNIST: uint8 (28, 28, 3), 10 classes.

    Args:
        path: folder of the four idx files (`train-images-idx3-ubyte` and so on, plain or .gz); None for the folder of
            Debian's package dataset-fashion-mnist.

    Raises:
        ValueError: a missing or damaged file.
    """
    folder = pathlib.Path(path or DEBIAN_FOLDER)
    if not folder.is_dir():
        hint = "" if path else " (apt install dataset-fashion-mnist installs it; or give the path of the idx files)"
        raise ValueError(f"path: expected a folder of Fashion-MNIST idx files, got {str(folder)!r}: not a folder{hint}")
    splits = {}
    for split, prefix in _PREFIX.items():
        images = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"), dimensions=3)
        labels = read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte"), dimensions=1)
        splits[split] = ArraySource(images, labels, name=f"{folder}, split {split}", num_classes=len(CLASS_NAMES))
    return Dataset(name="fashion_mnist", num_classes=len(CLASS_NAMES), class_names=CLASS_NAMES, **splits)


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    got = sorted(file.name for file in folder.iterdir())
    raise ValueError(f"path: expected {name} or {name}.gz in {str(folder)!r}, got {got[:10]}")


def read_idx(path: pathlib.Path, *, dimensions: int) -> np.ndarray:
    """Reads a uint8 array from an idx file: two zero bytes, 8 (unsigned bytes), number of axes, their lengths, data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a readable idx file, got {error}") from error
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path}: expected an idx file of {dimensions} axes of bytes, got a header {data[:4]!r}")
    shape = tuple(int(length) for length in np.frombuffer(data, ">u4", dimensions, offset=4))
    if len(data) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: expected {shape} = {np.prod(shape)} bytes of data, got {len(data) - header}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
