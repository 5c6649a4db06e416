"""Damaged files and folders are renamed, never deleted."""

import itertools
import os
from pathlib import Path


def set_aside(path: Path, target: Path) -> Path:
    """Renames `path` to the first free name of `target`, `target.1`, `target.2`, ..., and returns that name."""
    names = itertools.chain([target], (target.with_name(f"{target.name}.{number}") for number in itertools.count(1)))
    name = next(name for name in names if not name.exists())
    os.rename(path, name)
    return name
