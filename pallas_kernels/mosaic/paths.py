"""Which kernels a propagation takes: the cheapest for its map and mode, from the table in paths.json.

`python -m experiments.benchmarks.choose_variants` writes the table: times on a card, or estimates where there was none.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from pallas_kernels.dispatch import Paths
from pallas_kernels.mosaic.forms import GivenForms, MadeForms
from pallas_kernels.up_projection import UpProjection

TABLE = pathlib.Path(__file__).with_name("paths.json")
ON_CHIP = "_on_chip"


@dataclasses.dataclass(frozen=True)
class Work:
    """A propagation, as far as its paths depend on it."""

    shape: tuple[int, ...]  # of x: (B, H, W, C)
    dtype: str  # of x and the maps; the wider where they differ
    weight_channels: int
    chunk: int | None
    rank: int = 0  # S of the proxy; 0 where the maps are given


def choose(work: Work, path: str | None, is_interpreted: bool = False) -> Paths:
    """The paths of `work`; with `path`, this one, and backward `fused` where it serves forward alone.

    Raises:
      ValueError: `path` cannot serve the map on this card.
    """

    def possible(name: str, kernel: str = "forward") -> str:
        """The path of the row, or what serves a map that is larger or of a higher rank."""
        for candidate in (name, name.removesuffix(ON_CHIP)):
            try:
                _ = forms(work, candidate, is_interpreted, kernel)
                return candidate
            except ValueError:
                pass
        return "fused"

    if path is not None:
        _ = forms(work, path, is_interpreted)  # which raises
        return Paths(path, path, possible(path.removesuffix(ON_CHIP), "backward"))
    row, prefix = nearest(work), "" if work.rank else "given_"
    backward = possible(row["backward"], "backward") if work.rank else "fused"
    return Paths(possible(row[prefix + "inference"]), possible(row[prefix + "training"]), backward)


def forms(work: Work, path: str, is_interpreted: bool = False, kernel: str = "forward") -> GivenForms | MadeForms:
    """How the kernels of `path` cut the map.

    Raises:
      ValueError: no tile serves it.
    """
    *pixels, channels = work.shape
    x = jax.ShapeDtypeStruct(work.shape, work.dtype)
    options: Any = dict(chunk=work.chunk, on_chip=path.endswith(ON_CHIP), interpret=is_interpreted)
    if path.startswith("low_rank"):
        proxy = jax.ShapeDtypeStruct((*pixels, work.rank), work.dtype)
        of_maps: Any = jax.ShapeDtypeStruct((work.rank, 4, channels), work.dtype)
        logits: Any = jax.ShapeDtypeStruct((work.rank, 4, 3, work.weight_channels), work.dtype)
        return MadeForms(kernel, x, proxy, UpProjection(logits, of_maps, of_maps, of_maps), **options)
    logits = jax.ShapeDtypeStruct((*pixels, 4, 3, work.weight_channels), work.dtype)
    maps = [jax.ShapeDtypeStruct((*pixels, 4, channels), work.dtype)] * 3
    return GivenForms(kernel, x, logits, *maps, **options)


def nearest(work: Work) -> Mapping[str, Any]:
    """The row of the table whose map is most like that of `work`."""
    return min(_table()["rows"], key=lambda row: _distance(_features(work), _features(_work_of(row))))


def basis() -> str:
    """What the table rests on: "measured on ..." or "estimated for ..."."""
    return _table()["basis"]


def _work_of(row: Mapping[str, Any]) -> Work:
    shape = row["batch"], row["height"], row["width"], row["channels"]
    return Work(shape, "bfloat16", row["weight_channels"], row["chunk"], row["rank"])


def _features(work: Work) -> list[float]:
    """Logarithms of what decides: sides, lines of a chunk, parallel work, channels that share a weight, rank."""
    batch, height, width, channels = work.shape
    longer, shorter = max(height, width), min(height, width)
    lines = min(work.chunk or longer, longer)
    rank = [work.rank + 16] if work.rank else []
    sharing = channels / work.weight_channels
    return [math.log2(value) for value in (longer, shorter, lines, batch * channels, sharing, *rank)]


def _distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=False))


@functools.cache
def _table() -> Mapping[str, Any]:
    return json.loads(TABLE.read_text())
