"""Many images in one .npz file, made batch by batch by processes that may be interrupted, and read block by block."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

IMAGES, LABELS = "arr_0", "arr_1"


class Store:
    """What becomes FILE.npz, and FILE.json with its settings; until then FILE.parts/ holds batches.

    Args:
        path: FILE.npz.
        settings: JSON, how the images are made.

    Raises:
        ValueError: the file or its batches are there with other settings.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]):
        self._path = Path(path)
        if self._path.suffix != ".npz":
            raise ValueError(f"npz: expected a name that ends in .npz, got {path}")
        self._parts, self._json = self._path.with_suffix(".parts"), self._path.with_suffix(".json")
        settings = json.loads(json.dumps(dict(settings)))
        written = self._parts / "settings.json"
        for place in (self._json if self._path.exists() else None, written):
            if place is not None and place.exists():
                _check_same(json.loads(place.read_text()), settings, self._path)
            elif place is self._json:
                raise ValueError(f"npz: {path} is there, made by another program; take another name")
        if not self._path.exists():
            self._parts.mkdir(parents=True, exist_ok=True)
            _replace(written, json.dumps(settings, indent=2).encode() + b"\n")
        self._settings = settings

    def is_complete(self) -> bool:
        return self._path.exists()

    def missing(self, starts: Sequence[int]) -> list[int]:
        """Of the batches that begin at these numbers, those that this process has to make."""
        mine = starts[jax.process_index() :: jax.process_count()]
        return [start for start in mine if not self._part(start).exists()]

    def write(self, start: int, images: np.ndarray, labels: np.ndarray) -> None:
        """Keeps a batch; it is there as a whole or not at all."""
        part = self._part(start).with_suffix(".tmp")
        with part.open("wb") as file:
            np.savez(file, images=images, labels=labels)
        os.replace(part, self._part(start))

    def assemble(self, starts: Sequence[int], shape: tuple[int, ...]) -> None:
        """Makes one file of the batches, never holding more than one; waits for the other processes."""
        _wait("batches")
        if jax.process_index() == 0:
            count = self._settings["count"]
            part = self._path.with_suffix(".tmp")
            with zipfile.ZipFile(part, "w", allowZip64=True) as archive:
                images, labels = (self._of_all(starts, name) for name in ("images", "labels"))
                _write_array(archive, IMAGES, images, (count, *shape), np.uint8)
                _write_array(archive, LABELS, labels, (count,), np.int32)
            _replace(self._json, json.dumps(self._settings, indent=2).encode() + b"\n")
            os.replace(part, self._path)
            shutil.rmtree(self._parts)
        _wait("file")

    def first(self, count: int) -> np.ndarray:
        """The first images."""
        blocks, found = image_blocks(str(self._path), count), []
        for block in blocks:
            found.append(block)
            if sum(map(len, found)) >= count:
                break
        return np.concatenate(found)[:count]

    def _part(self, start: int) -> Path:
        return self._parts / f"{start:08d}.npz"

    def _of_all(self, starts: Sequence[int], name: str) -> Iterator[np.ndarray]:
        for start in starts:
            with np.load(self._part(start)) as part:
                yield part[name]


def image_count(path: str) -> int:
    """How many images a .npz file holds. Raises as `image_blocks`."""
    with _opened(path) as (_, shape):
        return shape[0]


def image_blocks(path: str, size: int = 1000) -> Iterator[np.ndarray]:
    """The images of a .npz file, uint8 (B, H, W, 3), so many at a time.

    Raises:
        ValueError: no such file, or no such array in it.
    """
    with _opened(path) as (file, shape):
        length = math.prod(shape[1:])
        for start in range(0, shape[0], size):
            count = min(size, shape[0] - start)
            yield np.frombuffer(file.read(count * length), np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The images' bytes, and their shape."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, in_columns, dtype = read(file)
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or in_columns:
                raise ValueError(f"{IMAGES} of {dtype} {shape}")
            yield file, shape
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        expected = f"expected an .npz file with {IMAGES} uint8 (N, H, W, 3)"
        raise ValueError(f"images: {expected}, got {path}: {error}") from error


def sha256(path: str) -> str:
    """Of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_array(
    archive: zipfile.ZipFile, name: str, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: Any
) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).tobytes())


def _replace(path: Path, content: bytes) -> None:
    part = path.with_suffix(f".tmp{jax.process_index()}")
    part.write_bytes(content)
    os.replace(part, path)


def _check_same(there: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    other = sorted(key for key in here if there.get(key) != here[key])
    if other:
        was = ", ".join(f"{key} (there {there.get(key)})" for key in other)
        raise ValueError(f"npz: {path} holds images of other settings; take another name or set back: {was}")


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
