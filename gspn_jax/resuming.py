"""Resumable work on files: checks of recorded settings, atomic writes, checksums, and barriers between processes."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils


def check_settings(argument: str, place: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compares the settings of unfinished or finished work with the settings of this run.

    Args:
        argument: name of the argument that chose `place`, for the message.
        place: file or folder of the work.
        there: settings of the work, read from JSON.
        here: settings of this run, JSON values.

    Raises:
        ValueError: settings differ; the message is one line that names them.
    """
    here = json.loads(json.dumps(here))  # tuples become lists, as in `there`
    other = [key for key in sorted(here) if there.get(key) != here[key]]
    if other:
        was, now = (", ".join(f"{key}={values.get(key)}" for key in other) for values in (there, here))
        raise ValueError(
            f"{argument}: expected the settings that {place} was made with ({was}), got {now}; "
            f"use those settings or choose another {argument}"
        )


def write_whole(path: Path, text: str) -> None:
    """Replaces a file atomically: it always holds the old text or the new."""
    draft = path.with_name(f"{path.name}.{jax.process_index()}.tmp")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's contents, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wait_for_all(name: str) -> None:
    """Waits until every process of this run has called this function with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
