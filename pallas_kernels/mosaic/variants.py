"""Which kernel variants a propagation runs: the fastest for the map's shape, from the table in variants.json.

`python -m experiments.benchmarks.choose_variants` writes the table: times measured on a GPU, or estimates without one.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from pallas_kernels.choices import Variants
from pallas_kernels.mosaic.forms import GivenForms, MadeForms
from pallas_kernels.up_projection import UpProjection

TABLE = pathlib.Path(__file__).with_name("variants.json")
ON_CHIP = "_on_chip"


@dataclasses.dataclass(frozen=True)
class Work:
    """The properties of a propagation that decide its variants."""

    shape: tuple[int, ...]  # (B, H, W, C) of x
    dtype: str  # of x and the maps; the wider one where they differ
    weight_channels: int
    chunk: int | None
    rank: int = 0  # S of the proxy; 0 where the maps are given


def choose(work: Work, variant: str | None, is_interpreted: bool = False) -> Variants:
    """The variants that run `work`.

    Args:
        work: the propagation.
        variant: None for the table's. A named one is taken for inference and training, and for the backward pass too
            if it has one that fits the map; else the backward pass is "fused".
        is_interpreted: whether Pallas' interpreter runs the kernels.

    Raises:
        ValueError: `variant` cannot run this map on this GPU.
    """

    def fitting(name: str, kernel: str = "forward") -> str:
        """`name`, or the next variant that fits: a map may be larger than the table's, or its rank higher."""
        for candidate in (name, name.removesuffix(ON_CHIP)):
            try:
                _ = forms(work, candidate, is_interpreted, kernel)
                return candidate
            except ValueError:
                pass
        return "fused"

    if variant is not None:
        _ = forms(work, variant, is_interpreted)  # raises if it does not fit
        return Variants(variant, variant, fitting(variant.removesuffix(ON_CHIP), "backward"))
    row, prefix = nearest(work), "" if work.rank else "given_"
    backward = fitting(row["backward"], "backward") if work.rank else "fused"
    return Variants(fitting(row[prefix + "inference"]), fitting(row[prefix + "training"]), backward)


def forms(work: Work, variant: str, is_interpreted: bool = False, kernel: str = "forward") -> GivenForms | MadeForms:
    """How the kernels of `variant` tile the map; `kernel` is "forward" or "backward".

    Raises:
        ValueError: no tile fits the map.
    """
    *pixels, channels = work.shape
    x = jax.ShapeDtypeStruct(work.shape, work.dtype)
    options: Any = dict(chunk=work.chunk, on_chip=variant.endswith(ON_CHIP), interpret=is_interpreted)
    if variant.startswith("low_rank"):
        proxy = jax.ShapeDtypeStruct((*pixels, work.rank), work.dtype)
        of_maps: Any = jax.ShapeDtypeStruct((work.rank, 4, channels), work.dtype)
        logits: Any = jax.ShapeDtypeStruct((work.rank, 4, 3, work.weight_channels), work.dtype)
        return MadeForms(kernel, x, proxy, UpProjection(logits, of_maps, of_maps, of_maps), **options)
    logits = jax.ShapeDtypeStruct((*pixels, 4, 3, work.weight_channels), work.dtype)
    maps = [jax.ShapeDtypeStruct((*pixels, 4, channels), work.dtype)] * 3
    return GivenForms(kernel, x, logits, *maps, **options)


def nearest(work: Work) -> Mapping[str, Any]:
    """The table's row whose map is closest to that of `work`."""
    return min(_table()["rows"], key=lambda row: _distance(_features(work), _features(_work_of(row))))


def basis() -> str:
    """Where the table's times come from: "measured on ..." or "estimated for ..."."""
    return _table()["basis"]


def _work_of(row: Mapping[str, Any]) -> Work:
    shape = row["batch"], row["height"], row["width"], row["channels"]
    return Work(shape, "bfloat16", row["weight_channels"], row["chunk"], row["rank"])


def _features(work: Work) -> list[float]:
    """Logarithms of the sizes that the times depend on."""
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
