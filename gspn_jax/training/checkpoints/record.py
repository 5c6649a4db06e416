"""The JSON record of a checkpoint: its arrays, the progress and the description of the run."""

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gspn_jax.training.checkpoints.fingerprint import leaves_by_path

CONFIG_FILE = "config.json"


class OtherShapes(ValueError):
    """An intact checkpoint has other arrays than those asked for."""


def make(
    items: Mapping[str, Any], prints: Mapping[str, Any], description: Mapping[str, Any], progress: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the record of `items` (name -> tree) with the fingerprints of `fingerprints(items)`."""
    arrays = {
        name: {
            path: [list(leaf.shape), str(leaf.dtype), int(prints[f"{name}/{path}"])]
            for path, leaf in leaves_by_path(tree).items()
        }
        for name, tree in items.items()
    }
    step = int(jax.device_get(items["optimizer"]["step"])) if "optimizer" in items else 0
    # Plain JSON values, so that the checksum is that of the record that will be read (tuples become lists).
    content = {
        "step": step,
        "arrays": arrays,
        "description": plain(description, "description"),
        "progress": plain(progress, "progress"),
    }
    return {"checksum": _checksum(content), "content": content}


def checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a record that was read; ValueError if it changed since it was made."""
    content = record["content"]
    if _checksum(content) != record["checksum"]:
        raise ValueError("the record does not match its checksum")
    content = dict(content)
    if "meta" in content:  # written by version 0.1
        content["description"] = content.pop("meta")
    return content


def plain(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns JSON values as they will be read again; ValueError for NaN and Inf, which JSON cannot hold."""
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except ValueError as error:
        keys = [key for key, value in _flatten(values).items() if isinstance(value, float) and not math.isfinite(value)]
        where = f" in {', '.join(keys)}" if keys else ""
        raise ValueError(f"{name}: expected finite numbers, got NaN or Inf{where}") from error


def not_finite(finite: Mapping[str, Any]) -> str:
    """Returns words that name the arrays with NaN or Inf.

    Args:
        finite: path -> whether all numbers of the array are finite.
    """
    bad = [path for path, good in finite.items() if not good]
    return f"NaN or Inf in {', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}"


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def abstract(arrays: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Returns the nested dict of ShapeDtypeStructs that a record describes; every device holds them whole."""
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec())
    tree: dict[str, Any] = {}
    for path, (shape, dtype, _) in arrays.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype), sharding=everywhere)
    return tree


def check_shapes(arrays: Mapping[str, list[Any]], target: Mapping[str, Any]) -> None:
    """Raises OtherShapes, naming paths, unless the recorded arrays are exactly those of `target` (path -> leaf)."""
    have = {path: (tuple(shape), dtype) for path, (shape, dtype, _) in arrays.items()}
    want = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in target.items()}
    different = sorted(path for path in have.keys() | want.keys() if have.get(path) != want.get(path))
    if different:
        shown = ", ".join(f"{path}: has {have.get(path)}, needs {want.get(path)}" for path in different[:3])
        raise OtherShapes(f"{len(different)} arrays differ from what this run needs ({shown})")


def check_fingerprints(arrays: Mapping[str, Mapping[str, list[Any]]], prints: Mapping[str, Any]) -> None:
    """Raises ValueError, naming arrays, if a fingerprint differs from the recorded one."""
    changed = [
        path for path, value in prints.items() if int(value) != arrays[path.split("/", 1)[0]][path.split("/", 1)[1]][2]
    ]
    if changed:
        raise ValueError(f"{len(changed)} arrays are not what was saved: {', '.join(changed[:3])}")


def write_config(workdir: str | os.PathLike[str], description: Mapping[str, Any]) -> None:
    """Writes the description of a run to `<workdir>/config.json`; readers never see a part of it."""
    text = json.dumps(plain(description, "description"), indent=2, sort_keys=True) + "\n"
    path = Path(workdir) / CONFIG_FILE
    draft = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        os.replace(draft, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], free: frozenset[str] = frozenset()) -> list[str]:
    """Returns the dotted keys, with both values, at which two configurations differ.

    Args:
        before, after: nested mappings of JSON values.
        free: keys that may change, with all keys below them.
    """
    old, new = _flatten(json.loads(json.dumps(before))), _flatten(json.loads(json.dumps(after)))
    return [
        f"{key} (was {old.get(key)!r}, is {new.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
