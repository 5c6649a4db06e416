"""Many images in one .npz file, written batch by batch by interruptible processes and read block by block."""

import contextlib
import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import jax
import numpy as np

from gspn_jax import folder_lock, resuming

IMAGES, LABELS = "arr_0", "arr_1"
_DAMAGED = (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile)

_log = logging.getLogger(__name__)


class Store:
    """An archive of images, written batch by batch.

        with Store("samples.npz", settings) as store:
            for start in store.missing():
                store.write(start, images, labels)
            store.assemble()

    FILE.parts/ holds the batches until `assemble` writes FILE.npz, and the settings into FILE.json. Every process of a
    run enters the `with` block; a lock keeps other runs out.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]):
        """Checks the target without changing it.

        Args:
            path: FILE.npz; the suffix may be in capitals. A missing folder is made on entering the block.
            settings: JSON that says how the images are made, with "count" (number of images), "batch_size" (images in a
                batch) and "image_size" (H, W). `count` may change until the file is finished.

        Raises:
            ValueError: another suffix, a folder that cannot be written, or a file or batches with other settings.
        """
        self._path = Path(path)
        if self._path.suffix.lower() != ".npz":
            raise ValueError(f"npz: expected a name that ends in .npz, got {path}")
        above = next(folder for folder in self._path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ValueError(f"npz: expected a folder that can be written, got {above}")
        self._parts, self._json = self._path.with_suffix(".parts"), self._path.with_suffix(".json")
        self._settings = json.loads(json.dumps(dict(settings)))
        self._count, self._batch_size = self._settings["count"], self._settings["batch_size"]
        self._shape = (*self._settings["image_size"], 3)
        self._lock = contextlib.ExitStack()
        self._check()

    def _check(self) -> None:
        """Raises ValueError if the file or its batches were made with other settings."""
        if self._path.exists():
            if not self._json.exists():
                raise ValueError(f"npz: expected a new file or one that this command made, got {self._path}")
            resuming.check_settings("npz", self._path, _settings(self._json), self._settings)
        # A run that failed before its first batch may be tried again with other settings.
        elif any(self._parts.glob("*.npz")):
            begun = {key: value for key, value in self._settings.items() if key != "count"}
            resuming.check_settings("npz", self._parts, _settings(self._parts / "settings.json"), begun)

    def __enter__(self) -> Self:
        """Takes the lock and records the settings.

        Raises:
            FolderInUse: another run writes the same file.
            ValueError: as from the constructor.
        """
        self._lock.enter_context(folder_lock.hold(self._parts, "sampling"))
        try:
            self._check()  # another run may have ended since the constructor checked
            if jax.process_index() == 0 and not self.is_complete():
                resuming.write_whole(self._parts / "settings.json", json.dumps(self._settings, indent=2) + "\n")
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        if jax.process_index() == 0 and self.is_complete():
            shutil.rmtree(self._parts, ignore_errors=True)

    def is_complete(self) -> bool:
        """Returns whether the file is finished."""
        return self._path.exists()

    def missing(self) -> list[int]:
        """Returns the first image numbers of the batches that this process must still make; removes damaged batches."""
        mine = self._starts[jax.process_index() :: jax.process_count()]
        for start in mine:
            part = self._part(start)
            if part.exists() and not self._is_batch(part, min(self._batch_size, self._count - start)):
                _log.warning("%s: not a batch of this run; it is made again", part)
                part.unlink()
        return [start for start in mine if not self._part(start).exists()]

    def write(self, start: int, images: np.ndarray, labels: np.ndarray) -> None:
        """Writes a batch; its file appears when it is complete.

        Args:
            start: number of its first image.
            images: uint8 (B, H, W, 3).
            labels: integers (B,).

        Raises:
            ValueError: another dtype or shape.
        """
        if images.dtype != np.uint8 or images.shape != (len(labels), *self._shape):
            expected = f"uint8 {(len(labels), *self._shape)}"
            raise ValueError(f"images: expected {expected}, got {images.dtype} {images.shape}")
        part = self._part(start).with_suffix(".tmp")
        with part.open("wb") as file:
            np.savez(file, images=images, labels=labels)
        os.replace(part, self._part(start))

    def assemble(self) -> None:
        """Joins the batches into one file, with one batch in memory at a time; waits for the other processes.

        Raises:
            ValueError: a batch is damaged; the message names its file.
        """
        resuming.wait_for_all("batches")
        if jax.process_index() == 0:
            part = self._path.with_suffix(".tmp")
            with zipfile.ZipFile(part, "w", allowZip64=True) as archive:
                images, labels = (self._of_all(name) for name in ("images", "labels"))
                _write_array(archive, IMAGES, images, (self._count, *self._shape), np.uint8)
                _write_array(archive, LABELS, labels, (self._count,), np.int32)
            resuming.write_whole(self._json, json.dumps(self._settings, indent=2) + "\n")
            os.replace(part, self._path)
        resuming.wait_for_all("file")

    def first(self, count: int) -> np.ndarray:
        """Returns the first `count` images, uint8 (count, H, W, 3), or all if the file has fewer."""
        return next(image_blocks(str(self._path), count))

    @property
    def _starts(self) -> Sequence[int]:
        return range(0, self._count, self._batch_size)

    def _part(self, start: int) -> Path:
        return self._parts / f"{start:08d}.npz"

    def _is_batch(self, part: Path, rows: int) -> bool:
        """Returns whether a batch's headers are right; `assemble` checks the contents."""
        try:
            with _array(part, "images") as (_, shape, dtype), _array(part, "labels") as (_, labels, kind):
                are_images = dtype == np.uint8 and shape == (rows, *self._shape)
                return are_images and labels == (rows,) and np.issubdtype(kind, np.integer)
        except _DAMAGED:
            return False

    def _of_all(self, name: str) -> Iterator[np.ndarray]:
        """Yields an array of each batch; removes a damaged batch and raises ValueError."""
        for start in self._starts:
            try:
                with np.load(self._part(start)) as part:
                    yield part[name]
            except _DAMAGED as error:
                file = self._part(start)
                file.unlink(missing_ok=True)
                raise ValueError(
                    f"npz: {file} was damaged ({error}) and is removed; the same command makes it again"
                ) from error


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Returns images of any shape, about -1 to 1, as uint8 0 to 255; ValueError for NaN or Inf."""
    if not np.all(np.isfinite(images)):
        raise ValueError("images: expected finite numbers, got NaN or Inf: the network's parameters may be wrong")
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _settings(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError if the file holds none."""
    try:
        settings = json.loads(path.read_text())
        if isinstance(settings, dict):
            return settings
        error: Any = f"a {type(settings).__name__}"
    except ValueError as reason:
        error = reason
    raise ValueError(f"npz: expected settings as a JSON object in {path}, got {error}")


def image_count(path: str) -> int:
    """Returns the number of images in a .npz file; raises the errors of `image_blocks`."""
    with _opened(path) as (_, shape):
        return shape[0]


def image_blocks(path: str, size: int = 1000) -> Iterator[np.ndarray]:
    """Yields the images of a .npz file, uint8 (B, H, W, 3), `size` at a time.

    Raises:
        ValueError: the file, or its array arr_0, is missing or damaged.
    """
    with _opened(path) as (file, shape):
        length = math.prod(shape[1:])
        for start in range(0, shape[0], size):
            count = min(size, shape[0] - start)
            content = file.read(count * length)
            if len(content) != count * length:
                raise ValueError("it is cut off")
            yield np.frombuffer(content, np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Opens the images of a .npz file and yields a stream of their bytes, and their shape (N, H, W, 3)."""
    try:
        with _array(path, IMAGES) as (file, shape, dtype):
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or min(shape[1:3]) < 1:
                raise ValueError(f"{IMAGES} of {dtype} {shape}")
            yield file, shape
    except _DAMAGED as error:
        expected = f"expected an .npz file with {IMAGES} uint8 (N, H, W, 3), H and W at least 1"
        raise ValueError(f"images: {expected}, got {path}: {error}") from error


@contextlib.contextmanager
def _array(path: str | Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Opens an array of a .npz file and yields a stream of its bytes, shape and dtype; ValueError for Fortran order."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read(file)
        if in_columns:
            raise ValueError(f"{name} in Fortran order")
        yield file, shape, dtype


def _write_array(
    archive: zipfile.ZipFile, name: str, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: Any
) -> None:
    """Writes an array of a known shape in parts along its first axis."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).tobytes())
