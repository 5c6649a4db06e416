"""The interface of data sources: random access by index."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gspn_jax.data import decoding

MAX_CLASSES = 2**20


class Source(Protocol):
    """Images with labels, by index. Must be picklable when worker processes are used."""

    def __len__(self) -> int:
        """Returns the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        """Returns (image uint8 (H, W, 3), of any size; label). Raises CorruptImage if it cannot be decoded."""
        ...

    def describe(self, index: int, /) -> str:
        """Returns the path or index of the sample, for messages."""
        ...


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A source of compressed files: the pipeline decodes them itself, no larger than a crop needs."""

    def encoded(self, index: int, /) -> tuple[bytes, int]:
        """Returns (contents of the image file, label). Raises CorruptImage if it is not a regular file."""
        ...


@runtime_checkable
class Latents(Protocol):
    """Latents of images with labels, by index.

    Attributes:
        shape: (H, W, C) of the latents.
        image_size: side of the images in pixels.
        copies: 2 if latents of mirror images are included, else 1.
    """

    shape: tuple[int, int, int]
    image_size: int
    copies: int

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def latents(self, index: int, copy: int = 0, /) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns (mean, log variance, label) of an image or, with copy 1, of its mirror image."""
        ...

    def describe(self, index: int, /) -> str:
        """Returns the path or index of the sample, for messages."""
        ...


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """The latents that a dataset holds.

    Attributes:
        shape: (H, W, C) of the latents of an image.
        scale: a network takes latents multiplied by this number.
        autoencoder: SHA-256 of the autoencoder's file; "" if unknown.
    """

    shape: tuple[int, int, int]
    scale: float
    autoencoder: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a held-out source with the same classes.

    Attributes:
        name: one of SOURCES, or the name that the data themselves have.
        num_classes: number of classes.
        class_names: their names, in the order of the labels.
        train, test: a `Source` each; `Latents` if `latents` is set.
        latents: which latents they are; None for images.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    train: Any
    test: Any
    latents: LatentSpace | None = None


class ArraySource:
    """Images held in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, name: str, num_classes: int):
        """Checks the arrays once, so that no sample needs a check later.

        Args:
            images: uint8 (N, H, W, 3), or (N, H, W) or (N, H, W, 1) for grey images, which become RGB on access.
            labels: (N,) integers in [0, num_classes).
            name: of this source in messages, for example "cifar10.npz, split train".
            num_classes: number of classes.

        Raises:
            ValueError: wrong dtype or shape, no samples, or a label out of range.
        """
        if images.dtype != np.uint8:
            raise ValueError(f"{name}: images: expected dtype uint8 (0..255), got {images.dtype}")
        if images.ndim == 4 and images.shape[-1] == 1:
            images = images[..., 0]
        if not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)):
            raise ValueError(f"{name}: images: expected shape (N, H, W) or (N, H, W, 3), got {images.shape}")
        if min(images.shape[1:3]) < 1:
            raise ValueError(f"{name}: images: expected at least one row and one column, got {images.shape}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{name}: labels: expected shape {images.shape[:1]}, one per image, got {labels.shape}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{name}: labels: expected integers, got dtype {labels.dtype}")
        if not len(images):
            raise ValueError(f"{name}: expected at least one sample, got an empty split")
        check_labels(labels, name=name, num_classes=num_classes)
        self.images = images
        self.labels = labels.astype(np.int32)
        self.name = name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        image = self.images[index]
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        return image, int(self.labels[index])

    def describe(self, index: int, /) -> str:
        return f"{self.name}, sample {index}"


def check_labels(labels: np.ndarray, *, name: str, num_classes: int) -> None:
    """Raises ValueError, which names the first label outside [0, num_classes)."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        first = int(wrong[0])
        raise ValueError(
            f"{name}: labels: expected 0 to {num_classes - 1} (num_classes={num_classes}), "
            f"got {labels[first]} at sample {first} ({wrong.size} such labels)"
        )


def check_class_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Returns the names as a tuple; "0", "1", ... if they are None.

    Raises:
        ValueError: another number of names, or more classes than any data set has, such as one wrong label asks for.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes: expected 1 to {MAX_CLASSES:,}, got {num_classes:,}")
    if class_names is None:
        return tuple(str(number) for number in range(num_classes))
    if len(class_names) != num_classes:
        raise ValueError(f"class_names: expected {num_classes} names, got {len(class_names)}")
    return tuple(class_names)


class FileSource:
    """A source of compressed image files; a subclass defines `__len__`, `encoded` and `describe`."""

    def encoded(self, index: int, /) -> tuple[bytes, int]:
        raise NotImplementedError

    def describe(self, index: int, /) -> str:
        raise NotImplementedError

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        data, label = self.encoded(index)
        try:
            return np.asarray(decoding.decode(decoding.open_picture(data))), label
        except decoding.CorruptImage as error:
            raise decoding.CorruptImage(f"{self.describe(index)}: {error}") from error
