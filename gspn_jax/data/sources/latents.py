"""Latents of images, as `gspn_jax.data.encoding` writes them: a folder with a manifest, and records in shards.

    FOLDER/manifest.json
    FOLDER/train/00000-of-00128.array_record, ...
    FOLDER/test/...

A record is a label, then the mean and the log variance of the image's latents, and those of its mirror image if mirror
images were encoded.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import grain
import numpy as np

from gspn_jax.data.sources.latent_manifest import SPLITS, read_manifest, shard_files
from gspn_jax.data.sources.protocol import Dataset, LatentSpace

_LABEL = np.dtype("<i4")
_READERS = 16  # threads: opening shards waits for the disk, not for the processor
_REPAIR = "the same encode_latents command writes it again"


@dataclasses.dataclass(frozen=True)
class LatentRecord:
    """Layout of a record.

    Attributes:
        shape: (H, W, C) of the latents.
        dtype: dtype of the stored numbers, "float16" or "float32".
        copies: 2 if the mirror image is included, else 1.
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
        """Returns a record.

        Args:
            moments: (copies, 2, H, W, C): of each copy the mean, then the log variance.
            label: of the image.

        Raises:
            ValueError: another shape, NaN, Inf, or numbers too large for the dtype.
        """
        if moments.shape != self._moments:
            raise ValueError(f"moments: expected shape {self._moments}, got {moments.shape}")
        if not np.all(np.isfinite(moments)):
            raise ValueError("moments: expected finite numbers, got NaN or Inf")
        with np.errstate(over="ignore"):
            stored = moments.astype(np.dtype(self.dtype).newbyteorder("<"))
        if not np.all(np.isfinite(stored)):
            raise ValueError(f"moments: expected numbers within {self.dtype}, got {np.abs(moments).max():.3g}")
        return np.array(label, _LABEL).tobytes() + stored.tobytes()

    def unpacked(self, record: bytes, copy: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns (mean (H, W, C), log variance (H, W, C), label) of the image or, with copy 1, of its mirror image.

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

    def __init__(self, files: list[pathlib.Path], layout: LatentRecord, *, image_size: int, num_classes: int):
        """Opens the shards; ValueError, which names the file, for a damaged one."""
        self.files, self.layout, self.image_size, self.num_classes = (
            list(map(str, files)),
            layout,
            image_size,
            num_classes,
        )
        self.shape, self.copies = layout.shape, layout.copies
        with futures.ThreadPoolExecutor(_READERS) as pool:
            self._shards = list(pool.map(open_shard, self.files))
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def latents(self, index: int, copy: int = 0, /) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns (mean, log variance, label); copy 1 is the mirror image. ValueError for a damaged record."""
        number, position = self._place(index)
        try:
            mean, log_variance, label = self.layout.unpacked(self._shards[number][position], copy)
        except (RuntimeError, ValueError) as error:  # array_record's message is often empty
            raise ValueError(f"{self.describe(index)}: damaged{_because(error)}; {_REPAIR}") from error
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{self.describe(index)}: label: expected 0 to {self.num_classes - 1}, got {label}")
        return mean, log_variance, label

    def describe(self, index: int, /) -> str:
        number, position = self._place(index)
        return f"{self.files[number]}, record {position}"

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the shard of an image and its position in that shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)


def open_shard(file: str) -> Any:
    """Returns the records of a shard, by index; ValueError, which names the file, if it is damaged."""
    try:
        return grain.sources.ArrayRecordDataSource([file])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: damaged shard{_because(error)}; {_REPAIR}") from error


def latents(path: str | None = None) -> Dataset:
    """Opens latents: mean and log variance for each image, from which training draws new latents in each epoch.

    Args:
        path: a folder that `gspn_jax.data.encoding.encode_dataset` wrote.

    Raises:
        ValueError: no such folder, a malformed manifest, or shards that are missing or damaged.
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
        _check_files(folder, split, files, manifest["files"])
        sources[split] = LatentRecords(files, layout, image_size=manifest["image_size"], num_classes=len(names))
        count, expected = len(sources[split]), manifest["images"][split]
        if not count or count > expected or (count < expected and manifest["on_corrupt"] != "drop"):
            raise ValueError(f"path: expected {expected} images in split {split} of {path}, got {count}")
    space = LatentSpace(layout.shape, float(manifest["scale"]), manifest["autoencoder"]["sha256"])
    return Dataset("latents", len(names), names, **sources, latents=space)


def _check_files(
    folder: pathlib.Path, split: str, files: list[pathlib.Path], checksums: Mapping[str, Mapping[str, Any]]
) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"path: expected {len(files)} shards of split {split}, but {len(missing)} are missing, such as "
            f"{missing[0]}; the same encode_latents command writes them"
        )
    for file in files:
        expected = checksums.get(file.relative_to(folder).as_posix())
        if expected is not None and file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{file}: expected {expected['bytes']:,} bytes, got {file.stat().st_size:,}; {_REPAIR}")


def _because(error: Exception) -> str:
    return f" ({' '.join(str(error).split())})" if str(error).strip() else ""
