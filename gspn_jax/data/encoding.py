"""Encodes the images of a dataset once, so that generators train on their latents.

A record stores mean and log variance, so that training draws new latents in each epoch, and optionally those of the
mirror image. A shard gets its name when it is complete. Repeating a call resumes interrupted work and writes damaged
shards again. Several processes share the shards.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from gspn_jax import folder_lock, resuming
from gspn_jax.data import decoding
from gspn_jax.data.arguments import check_bool, check_integer
from gspn_jax.data.loading import OnCorrupt
from gspn_jax.data.pipeline import EvaluationBatches, evaluation_batches
from gspn_jax.data.sources.latent_manifest import MANIFEST, MAX_SHARDS, SPLITS, UNFINISHED, read_manifest, shard_files
from gspn_jax.data.sources.latents import LatentRecord, open_shard
from gspn_jax.data.sources.protocol import Dataset, EncodedSource, Source

_log = logging.getLogger(__name__)

Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_CHECKSUM = ".sha256"  # suffix of a file beside a shard, until the manifest holds the checksums of all shards


def encode_dataset(
    dataset: Dataset,
    encode: Encode,
    folder: str | os.PathLike[str],
    *,
    shape: tuple[int, int, int],
    image_size: int,
    scale: float,
    origin: Mapping[str, Any],
    batch_size: int = 64,
    flip: bool = True,
    stored: str = "float16",
    images_per_shard: int = 10_000,
    num_threads: int = 8,
    on_corrupt: OnCorrupt = "stop",
    exif_rotation: bool = False,
) -> int:
    """Writes a folder of latents that `gspn_jax.data.load("latents", folder)` reads.

    Images are resized so that their short side is the image size, and their centre is cropped.

    Args:
        dataset: images.
        encode: images uint8 (B, image_size, image_size, 3) -> mean and log variance of their latents, (B, *shape) each.
        folder: folder of the latents. It may hold an interrupted encoding with the same settings.
        shape: (H, W, C) of the latents.
        image_size: side of the images in pixels.
        scale: factor by which networks multiply the latents; recorded, not applied.
        origin: JSON values that identify the autoencoder, for the manifest: "autoencoder" with at least its "sha256",
            and any other settings that change its results.
        batch_size: images at a time in this process.
        flip: encode mirror images too.
        stored: dtype of the records, "float16" or "float32".
        images_per_shard: number of images in a file.
        num_threads: threads that read images.
        on_corrupt: "stop" raises CorruptImage, "drop" leaves out images that cannot be decoded.
        exif_rotation: turn images upright by their EXIF orientation.

    Returns:
        The number of images that this process encoded.

    Raises:
        ValueError: an argument out of range, latents that are not finite, or other settings than the folder's.
        FolderInUse: another run writes into the folder.
        OSError: the folder cannot be written.
    """
    if dataset.latents is not None:
        raise ValueError(f"dataset: expected images, got {dataset.name}")
    for name, value in (("image_size", image_size), ("batch_size", batch_size), ("images_per_shard", images_per_shard)):
        check_integer(name, value, 1)
    check_bool("flip", flip)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"folder: expected a folder, got a file: {folder}")
    layout = LatentRecord(shape, stored, 1 + flip)
    sources: dict[str, Source] = {split: getattr(dataset, split) for split in SPLITS}
    shards = {split: -(-len(source) // images_per_shard) for split, source in sources.items()}
    if max(shards.values()) > MAX_SHARDS:
        raise ValueError(f"images_per_shard: expected at most {MAX_SHARDS:,} shards, got {max(shards.values()):,}")
    settings = {
        **origin,
        "class_names": dataset.class_names,
        "copies": layout.copies,
        "data": dataset.name,
        "dtype": stored,
        "exif_rotation": exif_rotation,
        "image_size": image_size,
        "images_per_shard": images_per_shard,
        "on_corrupt": on_corrupt,
        "images": {split: len(source) for split, source in sources.items()},
        "scale": scale,
        "shape": shape,
        "shards": shards,
    }
    with folder_lock.hold(folder, "encoding latents"):
        output = _Folder(Path(folder), settings)
        parts = []
        for split, source in sources.items():
            missing = output.missing(split, layout, on_corrupt, images_per_shard)
            parts += [
                (_Part(source, start, min(start + images_per_shard, len(source)), exif_rotation), file)
                for start, file in missing
            ]
        written = 0
        with tqdm(total=sum(len(part) for part, _ in parts), unit="image", disable=not parts) as bar:
            for part, file in parts:
                batches = evaluation_batches(
                    part,
                    batch_size=batch_size,
                    image_size=image_size,
                    resize=image_size,
                    num_threads=num_threads,
                    on_corrupt=on_corrupt,
                )
                try:
                    written += _write(file, _records(part, batches, encode, layout, bar))
                finally:
                    batches.close()
        output.finish()
    return written


class _Part:
    """A source of images start to stop - 1 of another source, decoded at full size."""

    def __init__(self, source: Source, start: int, stop: int, exif_rotation: bool):
        self._source, self._start, self._stop, self._exif_rotation = source, start, stop, exif_rotation

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        if not self._exif_rotation or not isinstance(self._source, EncodedSource):
            return self._source[self._start + index]
        data, label = self._source.encoded(self._start + index)
        return np.asarray(decoding.decode(decoding.open_picture(data, exif_rotation=True))), label

    def describe(self, index: int, /) -> str:
        return self._source.describe(self._start + index)


class _Folder:
    """The output folder: its settings, which shards it lacks, their checksums."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """Records the settings. ValueError if the folder has shards that were made with other settings."""
        self._folder, self._settings = folder, settings
        self._manifest: dict[str, Any] = {"files": {}}
        if (folder / MANIFEST).is_file():
            self._manifest = read_manifest(folder)
        there = self._manifest if len(self._manifest) > 1 else _read_object(folder / UNFINISHED)
        # An encoding that failed before its first shard may be tried again with other settings.
        if any(file for split in SPLITS for file in (folder / split).glob("*.array_record")):
            resuming.check_settings("output", folder, {"exif_rotation": False} | there, settings)
        else:
            self._manifest = {"files": {}}
            resuming.wait_for_all("settings compared")
            if jax.process_index() == 0:
                (folder / MANIFEST).unlink(missing_ok=True)
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        resuming.wait_for_all("settings read")
        if jax.process_index() == 0:
            resuming.write_whole(folder / UNFINISHED, json.dumps(settings, indent=2) + "\n")

    def missing(self, split: str, layout: LatentRecord, on_corrupt: str, size: int) -> list[tuple[int, Path]]:
        """Returns (first image, file) of the shards that this process has to write; removes damaged ones."""
        found, count = [], self._settings["images"][split]
        for number, file in enumerate(shard_files(self._folder, split, self._settings["shards"][split])):
            if number % jax.process_count() != jax.process_index():
                continue
            start = number * size
            if file.is_file() and not self._is_good(file, layout, min(size, count - start), on_corrupt):
                _log.warning("%s: damaged, will be written again", file)
                file.unlink()
            if not file.is_file():
                found.append((start, file))
        return found

    def finish(self) -> None:
        """Writes the manifest with the checksums of all shards."""
        resuming.wait_for_all("shards written")
        if jax.process_index() == 0:
            files = [
                file for split in SPLITS for file in shard_files(self._folder, split, self._settings["shards"][split])
            ]
            checksums = {self._name(file): self._checksum(file) or _checksum_of(file) for file in files}
            text = json.dumps({**self._settings, "files": checksums}, indent=2) + "\n"
            resuming.write_whole(self._folder / MANIFEST, text)
            for file in (self._folder / UNFINISHED, *(_beside(file) for file in files)):
                file.unlink(missing_ok=True)
        resuming.wait_for_all("manifest written")

    def _is_good(self, file: Path, layout: LatentRecord, images: int, on_corrupt: str) -> bool:
        expected = self._checksum(file)
        if expected is not None:
            return _checksum_of(file) == expected
        try:  # a shard of a version without checksums: each record has one of its own
            records = open_shard(str(file))
            for record in records:
                layout.unpacked(record)
        except (RuntimeError, ValueError):
            return False
        return len(records) == images or (on_corrupt == "drop" and len(records) < images)

    def _checksum(self, file: Path) -> dict[str, Any] | None:
        """Returns the recorded checksum; the file beside a shard is newer than the manifest."""
        return _read_object(_beside(file)) or self._manifest["files"].get(self._name(file))

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _beside(file: Path) -> Path:
    return file.with_name(file.name + _CHECKSUM)


def _checksum_of(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": resuming.file_sha256(file)}


def _records(
    part: _Part, batches: EvaluationBatches, encode: Encode, layout: LatentRecord, bar: tqdm
) -> Iterator[bytes]:
    start = 0
    for batch in batches:
        images = batch["image"]  # (B, S, S, 3)
        copies = [images, images[:, :, ::-1]][: layout.copies]
        moments = np.stack([np.stack(encode(np.ascontiguousarray(copy)), axis=1) for copy in copies], axis=1)
        for row in np.flatnonzero(batch["mask"]):  # moments: (B, copies, 2, h, w, c)
            try:
                record = layout.packed(moments[row], batch["label"][row])
            except ValueError as error:
                raise ValueError(f"latents of {part.describe(start + int(row))}: {error}") from error
            yield record
        start += len(images)
        bar.update(int(batch["mask"].sum()))


def _write(file: Path, records: Iterator[bytes]) -> int:
    """Writes a shard, which appears when it is whole, and its checksum beside it; returns the number of records."""
    part, count = file.with_suffix(".part"), 0
    writer = ArrayRecordWriter(str(part), "group_size:1")
    try:
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
        resuming.write_whole(_beside(file), json.dumps(_checksum_of(part)))
        os.replace(part, file)
    finally:
        if writer.is_open():
            writer.close()
        part.unlink(missing_ok=True)
    return count
