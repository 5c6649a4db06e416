"""Loads batches of images in one thread: sample numbers to pixels and labels.

Worker processes receive these objects, so they hold plain values and picklable sources only.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from gspn_jax.data import crops
from gspn_jax.data.arguments import check_bool, check_integer
from gspn_jax.data.augmentation import Augmentation, augment
from gspn_jax.data.decoding import CorruptImage, open_picture
from gspn_jax.data.sources.protocol import EncodedSource, Source

OnCorrupt = Literal["stop", "drop"]

_REPLACEMENTS = 100  # neighbours of a corrupt image that are tried before giving up


@dataclasses.dataclass(frozen=True)
class _Loader:
    source: Source
    image_size: crops.Size
    on_corrupt: OnCorrupt
    exif_rotation: bool

    def __post_init__(self) -> None:
        if not len(self.source):
            raise ValueError("source: expected at least one sample, got an empty one")
        if self.on_corrupt not in get_args(OnCorrupt):
            raise ValueError(f"on_corrupt: expected one of {get_args(OnCorrupt)}, got {self.on_corrupt!r}")
        check_bool("exif_rotation", self.exif_rotation)

    def _empty(self, rows: int) -> dict[str, Any]:
        return {
            "image": np.zeros((rows, *self.image_size, 3), np.uint8),
            "label": np.zeros(rows, np.int32),
            "corrupt": [],
        }

    @functools.cached_property
    def _encoded(self) -> EncodedSource | None:
        return self.source if isinstance(self.source, EncodedSource) else None

    def _open(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        if self._encoded is None:
            return self.source[index]
        data, label = self._encoded.encoded(index)
        return open_picture(data, exif_rotation=self.exif_rotation), label

    def _name(self, index: int, error: CorruptImage) -> str:
        """Returns an error's message, with the file's name if the error does not name it."""
        name = self.source.describe(index)
        return str(error) if str(error).startswith(name) else f"{name}: {error}"


@dataclasses.dataclass(frozen=True)
class TrainingLoader(_Loader):
    """Loads augmented batches; a sample's random numbers depend only on the seed and its global position."""

    augmentation: Augmentation
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed, 0, 2**63 - 1)

    def __call__(self, samples: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        """Returns {"image", "label", "corrupt": messages} for (global positions, indices), both (b,)."""
        positions, indices = samples
        batch = self._empty(len(positions))
        for row in range(len(positions)):
            batch["label"][row] = self._fill(
                int(positions[row]), int(indices[row]), batch["image"][row], batch["corrupt"]
            )
        return batch

    def _fill(self, position: int, index: int, out: np.ndarray, corrupt: list[str]) -> int:
        """Writes the image of a position and returns its label; a corrupt image is replaced by the next good one."""
        for attempt in range(min(_REPLACEMENTS, len(self.source))):
            candidate = (index + attempt) % len(self.source)
            rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, position], np.uint64)))
            try:
                picture, label = self._open(candidate)
                augment(picture, self.image_size, self.augmentation, rng, out)
                return label
            except CorruptImage as error:
                message = self._name(candidate, error)
                if self.on_corrupt == "stop":
                    raise CorruptImage(message) from error
                if attempt == 0:
                    corrupt.append(message)
        raise CorruptImage(f"{corrupt[-1]}; neither can the samples after it")


@dataclasses.dataclass(frozen=True)
class EvaluationLoader(_Loader):
    """Loads resized and centre-cropped batches; sample numbers past the end of the source give padding."""

    resize: int | None

    def __call__(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns {"image", "label", "mask", "corrupt": messages} for sample numbers (b,)."""
        batch = self._empty(len(indices))
        batch["mask"] = np.zeros(len(indices), bool)
        for row, index in enumerate(int(index) for index in indices):
            if index >= len(self.source):
                continue
            try:
                picture, label = self._open(index)
                if isinstance(picture, np.ndarray):
                    picture = Image.fromarray(picture)
                box = crops.centre_box((picture.height, picture.width), self.image_size, self.resize)
                batch["image"][row] = np.asarray(crops.resample(picture, box, self.image_size))
            except CorruptImage as error:
                message = self._name(index, error)
                if self.on_corrupt == "stop":
                    raise CorruptImage(message) from error
                batch["corrupt"].append(message)
                continue
            batch["label"][row] = label
            batch["mask"][row] = True
        return batch
