"""Reads files of parameters: safetensors in one file or in shards, and PyTorch's .pt and .pth.

A source is a path, or `hf://owner/name/file` for a file of the Hugging Face Hub (`hf://owner/name@revision/file` for
another revision than the main one), which is fetched once and kept in the hub's cache.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gspn_jax.weights.torch_file import LEGACY_START, StandIn, Tensor, TorchFile
from gspn_jax.weights.torch_layouts import innermost

_HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?/(?P<file>.+)")
_ZIP_START = b"PK\x03\x04"
_LONGEST_INDEX = 2**26  # bytes
_LONGEST_NAME = 1000
_SAFETENSORS_DTYPES = frozenset("F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL".split())


def read_arrays(source: str | os.PathLike[str], *, argument: str = "source") -> dict[str, np.ndarray]:
    """Reads parameters by name. No code that a file may hold is run, and PyTorch is not needed.

    Args:
        source: a .safetensors file, the .index.json of a sharded one, or a .pt or .pth file; a path or hf://... Of a
            checkpoint that holds more than parameters, these are taken: the moving averages ("ema") where it has them,
            else "model" or "state_dict". Of a module (TorchScript too), its parameters and buffers.
        argument: what messages call the source.

    Returns:
        arrays by their names in the file, which may be read-only. float16 and bfloat16 become float32.

    Raises:
        ValueError: names the source and, where one is to blame, the tensor: a missing, damaged or other file; a tensor
            with a dtype of 8 bits (FP8) or complex numbers.
    """
    try:
        return _read(str(source))
    except ValueError as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{argument}: expected a safetensors, .pt or .pth file, got {source}: {words}") from error


class SafetensorsArrays(Mapping[str, np.ndarray]):
    """The tensors of a .safetensors file by name; each is read when it is asked for, and not kept.

    float16 and bfloat16 become float32, as in `read_arrays`.

    Raises:
        ValueError: a damaged file, or a tensor with a dtype of 8 bits.
    """

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="numpy")
            self._names = dict.fromkeys(self._file.keys())
            for name in self._names:
                dtype = self._file.get_slice(name).get_dtype()
                if dtype not in _SAFETENSORS_DTYPES:
                    raise ValueError(f"tensor {name[:200]} has dtype {dtype}")
        except SafetensorError as error:
            raise ValueError(str(error)) from error

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return _widened(self._file.get_tensor(name))

    def __contains__(self, name: object) -> bool:  # Mapping's would read the tensor
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_arrays(source: str | os.PathLike[str], *, argument: str = "source") -> Mapping[str, np.ndarray]:
    """Returns and raises what `read_arrays` does, but reads a tensor of a .safetensors file when it is asked for."""
    path = local_file(source, argument=argument)
    if path.suffix != ".safetensors":
        return read_arrays(source, argument=argument)
    try:
        return SafetensorsArrays(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: expected a safetensors file, got {source}: {error}") from error


def read_names(source: str | os.PathLike[str], *, argument: str = "source") -> list[str]:
    """Returns the names that `read_arrays` would give; reads no tensor of a .safetensors file.

    Raises:
        ValueError: as `read_arrays`.
    """
    return list(open_arrays(source, argument=argument))


def local_file(source: str | os.PathLike[str], *, argument: str = "source") -> Path:
    """The file of a source on this machine, fetched from the hub if need be.

    Raises:
        ValueError: names the source that is missing, is not a regular file, or cannot be fetched.
    """
    try:
        return _local(str(source))
    except ValueError as error:
        raise ValueError(f"{argument}: expected a file, got {source}: {' '.join(str(error).split())}") from error


def _read(source: str) -> dict[str, np.ndarray]:
    path = _local(source)
    if path.name.endswith(".json"):
        arrays = _read_shards(source, path)
    else:
        arrays = _read_file(path)
    return {name: _widened(array) for name, array in arrays.items()}


def _local(source: str) -> Path:
    if source.startswith("hf://"):
        return _fetched(source)
    try:
        status = os.stat(source)
    except (OSError, ValueError) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(status.st_mode):  # a pipe could make reading wait forever
        raise ValueError("a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    if not status.st_size:
        raise ValueError("an empty file")
    return Path(source)


def _fetched(source: str) -> Path:
    match = _HUB.fullmatch(source)
    if match is None:
        raise ValueError("expected hf://owner/name/file or hf://owner/name@revision/file")
    import huggingface_hub  # takes a while, and only these sources need it

    try:
        path = huggingface_hub.hf_hub_download(match["repository"], match["file"], revision=match["revision"])
    except Exception as error:  # of several packages
        raise ValueError(f"cannot be fetched: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    return _local(path)


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_START))
            if start.startswith(_ZIP_START) or start == LEGACY_START:
                torch_file = TorchFile(file)
                return torch_file.arrays(_tensors(torch_file.tree))
        return dict(SafetensorsArrays(path))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def _tensors(tree: Any) -> dict[str, Tensor]:
    tree = _module_tensors(tree) if isinstance(tree, StandIn) else tree
    tree = innermost(tree) if isinstance(tree, dict) else {}
    tensors = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        names = ", ".join(str(name)[:40] for name in list(tree)[:5] if not isinstance(name, StandIn))
        raise ValueError(
            f"it holds no tensors by name, at the top or under ema, model or state_dict, but {names or 'none'}"
        )
    return tensors


def _module_tensors(module: StandIn) -> dict[str, Tensor]:
    """The tensors of a module by the names that its state dict would have; a module in two places counts once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    waiting = [("", module.fields)]
    while waiting:
        prefix, fields = waiting.pop()
        if id(fields) in seen:
            continue
        seen.add(id(fields))
        for key, value in fields.items():
            name = prefix + key if isinstance(key, str) and len(key) < _LONGEST_NAME else prefix
            if len(name) > _LONGEST_NAME:
                raise ValueError(f"modules inside modules without end: {name[:40]}...")
            if key in ("_parameters", "_buffers", "_modules") and isinstance(value, dict):
                waiting.append((prefix, value))
            elif isinstance(value, StandIn):
                waiting.append((f"{name}.", value.fields))
            elif isinstance(value, Tensor):
                found[name] = value
    return found


def _read_shards(source: str, path: Path) -> dict[str, np.ndarray]:
    if path.stat().st_size > _LONGEST_INDEX:
        raise ValueError("an index that is too large")
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("a JSON file that is no index of shards: it has no weight_map") from error
    arrays: dict[str, np.ndarray] = {}
    for shard in shards:
        if not isinstance(shard, str) or shard != os.path.basename(shard) or shard in ("", ".", "..") or "\\" in shard:
            raise ValueError(f"shard {str(shard)[:80]}, which is not the name of a file beside the index")
        folder = source.rpartition("/")[0]
        found = _read_file(_local(f"{folder}/{shard}" if folder else shard))
        for name in [name for name, place in places.items() if place == shard]:
            if name not in found:
                raise ValueError(f"tensor {name[:200]} is missing from {shard}")
            arrays[name] = found[name]
    return arrays


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array
