"""Latents of images, as `experiments.encode_latents` writes them: a folder with a manifest, and records in shards.

    FOLDER/manifest.json
    FOLDER/train/00000-of-00128.array_record, ...
    FOLDER/test/...

A record is a label, then the mean and the log variance of the image's latents, and the same of its mirror image where
mirror images were encoded.
"""

import dataclasses
import json
import pathlib
from typing import Any

import grain
import numpy as np

from gspn_jax.data.sources.protocol import Dataset, LatentSpace

MANIFEST = "manifest.json"
SPLITS = ("train", "test")
_LABEL = np.dtype("<i4")


@dataclasses.dataclass(frozen=True)
class LatentRecord:
    """How latents are laid out in a record.

    Attributes:
        shape: (H, W, C) of the latents.
        dtype: of the stored numbers, "float16" or "float32".
        copies: 2 where the mirror image is there too, else 1.
    """

    shape: tuple[int, int, int]
    dtype: str = "float16"
    copies: int = 1

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape: expected (H, W, C), got {self.shape}")
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype: expected float16 or float32, got {self.dtype!r}")
        if self.copies not in (1, 2):
            raise ValueError(f"copies: expected 1 or 2, got {self.copies}")

    def packed(self, moments: np.ndarray, label: int) -> bytes:
        """moments: (copies, 2, H, W, C), of each copy the mean, then the log variance.

        Raises:
            ValueError: another shape, or numbers that the dtype cannot hold.
        """
        with np.errstate(over="ignore"):
            stored = moments.astype(np.dtype(self.dtype).newbyteorder("<"))
        if stored.shape != self._moments or not np.all(np.isfinite(stored)):
            raise ValueError(f"moments: expected finite {self.dtype} of shape {self._moments}, got {moments.shape}")
        return np.array(label, _LABEL).tobytes() + stored.tobytes()

    def unpacked(self, record: bytes, copy: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
        """(mean (H, W, C), log variance (H, W, C), label) of the image, or of copy 1, its mirror image.

        Raises:
            ValueError: a record of another length.
        """
        length = _LABEL.itemsize + int(np.prod(self._moments)) * np.dtype(self.dtype).itemsize
        if len(record) != length:
            raise ValueError(f"record: expected {length} bytes, got {len(record)}")
        label = int(np.frombuffer(record, _LABEL, 1)[0])
        moments = np.frombuffer(record, np.dtype(self.dtype).newbyteorder("<"), offset=_LABEL.itemsize)
        mean, log_variance = moments.reshape(self._moments)[copy]
        return mean, log_variance, label

    @property
    def _moments(self) -> tuple[int, ...]:
        return (self.copies, 2, *self.shape)


class LatentRecords:
    """One split, by index, in the order of the images."""

    def __init__(self, files: list[str], layout: LatentRecord, *, name: str, image_size: int, num_classes: int):
        self.records: Any = grain.sources.ArrayRecordDataSource(files)
        self.layout, self.name, self.image_size, self.num_classes = layout, name, image_size, num_classes
        self.shape, self.copies = layout.shape, layout.copies

    def __len__(self) -> int:
        return len(self.records)

    def latents(self, index: int, copy: int = 0, /) -> tuple[np.ndarray, np.ndarray, int]:
        """(mean, log variance, label); copy 1 is the mirror image. ValueError for a record that is none of these."""
        try:
            mean, log_variance, label = self.layout.unpacked(self.records[index], copy)
        except ValueError as error:
            raise ValueError(f"{self.describe(index)}: {error}") from error
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{self.describe(index)}: label: expected 0 to {self.num_classes - 1}, got {label}")
        return mean, log_variance, label

    def describe(self, index: int, /) -> str:
        return f"{self.name}, record {index}"


def shard_files(folder: pathlib.Path, split: str, count: int) -> list[pathlib.Path]:
    """The files of a split, in order."""
    return [folder / split / f"{number:05d}-of-{count:05d}.array_record" for number in range(count)]


def latents(path: str | None = None) -> Dataset:
    """Latents of a dataset. Images come as their latents' mean and log variance, to be drawn anew each time.

    Args:
        path: the folder that `experiments.encode_latents` wrote.

    Raises:
        ValueError: no such folder, no readable manifest, or shards that are still missing.
    """
    if path is None:
        raise ValueError("path: expected a folder of latents, got None")
    folder = pathlib.Path(path)
    manifest = read_manifest(folder)
    layout = LatentRecord(tuple(manifest["shape"]), manifest["dtype"], manifest["copies"])
    names = tuple(manifest["class_names"])
    sources: dict[str, Any] = {}
    for split in SPLITS:
        files = shard_files(folder, split, manifest["shards"][split])
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"path: expected {len(files)} shards of split {split}, but {len(missing)} are missing, such as "
                f"{missing[0]}; the same encode_latents command goes on"
            )
        options: Any = dict(image_size=manifest["image_size"], num_classes=len(names))
        sources[split] = LatentRecords(list(map(str, files)), layout, name=f"{path}, split {split}", **options)
        count, expected = len(sources[split]), manifest["images"][split]
        if not count or count > expected or (count < expected and manifest["on_corrupt"] != "drop"):
            raise ValueError(f"path: expected {expected} images in split {split} of {path}, got {count}")
    space = LatentSpace(layout.shape, float(manifest["scale"]), manifest["autoencoder"]["sha256"])
    return Dataset("latents", len(names), names, **sources, latents=space)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Raises ValueError where there is none, or none of this kind."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        needed = {"shape", "dtype", "copies", "class_names", "shards", "image_size", "scale", "autoencoder", "images"}
        needed |= {"on_corrupt"}
        if needed - set(manifest):
            raise ValueError(f"it lacks {', '.join(sorted(needed - set(manifest)))}")
        return manifest
    except (OSError, ValueError) as error:
        raise ValueError(f"path: expected a folder of latents with {MANIFEST}, got {str(folder)!r}: {error}") from error
