"""The manifest of a folder of latents: the settings of the encoding, the shards, and their checksums."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

MANIFEST = "manifest.json"
UNFINISHED = "encoding.json"  # the settings, until all shards are written
SPLITS = ("train", "test")
MAX_SHARDS = 99_999  # five digits in a file's name

# Key: the expected value in words, and a check of it. `files` is optional: earlier versions wrote no checksums.
_NEEDED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "shape": ("three integers >= 1", lambda value: _is_list(value, _is_count) and len(value) == 3),
    "dtype": ("float16 or float32", lambda value: value in ("float16", "float32")),
    "copies": ("1 or 2", lambda value: _is_count(value) and value <= 2),
    "class_names": ("a list of names", lambda value: bool(value) and _is_list(value, _is_text)),
    "shards": (f"1 to {MAX_SHARDS} for train and test", lambda value: _is_by_split(value, MAX_SHARDS)),
    "images": ("numbers of images for train and test", lambda value: _is_by_split(value, math.inf)),
    "image_size": ("an integer >= 1", lambda value: _is_count(value)),
    "scale": ("a positive number", lambda value: isinstance(value, int | float) and 0 < value < math.inf),
    "autoencoder": ("an object with sha256", lambda value: isinstance(value, dict) and _is_text(value.get("sha256"))),
    "on_corrupt": ("stop or drop", lambda value: value in ("stop", "drop")),
}


def shard_files(folder: pathlib.Path, split: str, count: int) -> list[pathlib.Path]:
    """Returns the shards of a split, in order."""
    return [folder / split / f"{number:05d}-of-{count:05d}.array_record" for number in range(count)]


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Reads and checks a manifest.

    Returns:
        Its content. "files" maps a shard, such as "train/00000-of-00128.array_record", to its "bytes" and "sha256"; it
        is empty for folders of earlier versions.

    Raises:
        ValueError: the manifest is missing or malformed, or the encoding is not finished; one line.
    """
    if (folder / UNFINISHED).is_file() and not (folder / MANIFEST).is_file():
        raise ValueError(
            f"path: expected a finished folder of latents, got {str(folder)!r}, whose encoding was interrupted; "
            "the same encode_latents command continues it"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        _check(manifest)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"path: expected a folder of latents with {MANIFEST}, got {str(folder)!r}: {error}") from error
    return {"files": {}} | manifest


def _check(manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise ValueError(f"expected a JSON object, got {type(manifest).__name__}")
    missing = sorted(set(_NEEDED) - set(manifest))
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    for key, (expected, is_right) in _NEEDED.items():
        if not is_right(manifest[key]):
            raise ValueError(f"{key}: expected {expected}, got {str(manifest[key])[:60]}")
    files = manifest.get("files", {})
    if not isinstance(files, dict) or not all(_is_checksum(value) for value in files.values()):
        raise ValueError(f"files: expected bytes and sha256 of each shard, got {str(files)[:60]}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(is_item(item) for item in value)


def _is_by_split(value: Any, most: float) -> bool:
    return isinstance(value, dict) and all(_is_count(value.get(split)) and value[split] <= most for split in SPLITS)


def _is_checksum(value: Any) -> bool:
    return isinstance(value, dict) and _is_count(value.get("bytes")) and _is_text(value.get("sha256"))
