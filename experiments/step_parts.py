"""What the instructions of a compiled train step are there for, and the least time that each part of the step takes."""

import collections
from collections.abc import Sequence
from typing import Any

from experiments import hlo_costs
from experiments.kernel_limits import COPY_BANDWIDTH

MATRIX_FLOPS = 700e12  # a second, bfloat16 on the tensor cores of an H200; its data sheet says 989e12
VECTOR_FLOPS = 60e12  # a second, float32 beside them, where depthwise convolutions run; its data sheet says 67e12
WHOLE = "whole step"
KERNELS, SCANS, MAPS, OTHER = "propagation kernels", "propagation, outside of kernels", "maps", "other"
# The part that a function of the source belongs to; the innermost function counts.
PARTS = {
    "propagate": SCANS,
    "propagate_low_rank": SCANS,
    "maps_of": MAPS,
    "GSPNMixer.__call__": MAPS,
    "DepthwiseConv.__call__": "depthwise convolution",
    "depthwise_conv": "depthwise convolution",
    "LayerNorm.__call__": "layer norm",
    "GlobalResponseNorm.__call__": "global response norm",
    "MLP.__call__": "MLP",
    "Block._mix": "projections",
    "Block.__call__": "projections",
    "AdaptiveHead.__call__": "head",
    "Conditioning.__call__": "head",
    "Generator.__call__": "head",
    "_run_blocks": "stacks of the scans",
    "residual": "residuals",
    "_add": "residuals",
    "Stem.__call__": "stem and downsampling",
    "Downsample.__call__": "stem and downsampling",
    "Classifier.__call__": "head",
    "Classification.logits": "images and loss",
    "Classification.loss": "images and loss",
    "Denoising.loss": "images and loss",
    "make_step.<locals>.step": "optimizer",
}
Row = dict[str, Any]


def part_of(cost: hlo_costs.Cost) -> str:
    """What an instruction is there for."""
    part = next((PARTS[name] for name in cost.frames if name in PARTS), OTHER)
    if part != SCANS:
        return part
    # The products of a propagation make maps from the proxy, and its gradient from theirs.
    return KERNELS if _is_kernel(cost) else MAPS if cost.kind == "matrix product" else SCANS


def _is_kernel(cost: hlo_costs.Cost) -> bool:
    return cost.kind.startswith("mosaic_gpu")


def bytes_of(cost: hlo_costs.Cost) -> int:
    """Bytes that an instruction reads and writes, once."""
    if not _is_kernel(cost):
        return cost.bytes
    # (B, H, W, 4, C), or 12 for logits, are the maps of the four directions: a launch on one of them takes a quarter.
    takes_all = "on_chip" in cost.operation
    each = ((array.bytes, not takes_all and array.dims[3:-1] in ((4,), (12,))) for array in cost.arrays)
    return sum(size // 4 if has_slots else size for size, has_slots in each)


def limit(cost: hlo_costs.Cost) -> float:
    """Seconds that an instruction takes at least, once."""
    rate = VECTOR_FLOPS if cost.kind == "depthwise convolution" else MATRIX_FLOPS
    return max(bytes_of(cost) / COPY_BANDWIDTH, cost.flops / rate)


def rows_of_program(text: str) -> list[Row]:
    """A row for a compiled program and one for each part of it, the longest first."""
    parts: dict[str, list[hlo_costs.Cost]] = collections.defaultdict(list)
    for cost in hlo_costs.Program(text).costs():
        parts[part_of(cost)].append(cost)
    whole = _row(WHOLE, [cost for costs in parts.values() for cost in costs])
    rows = sorted((_row(part, costs) for part, costs in parts.items()), key=lambda row: -row["limit_ms"])
    for row in (*rows, whole):  # the whole last: it is what the others are divided by
        row["share"] = round(row["limit_ms"] / whole["limit_ms"], 4)
        row["limit_ms"] = float(f"{row['limit_ms']:.4g}")
    return [whole, *rows]


def _row(part: str, costs: Sequence[hlo_costs.Cost]) -> Row:
    kinds: dict[str, float] = collections.defaultdict(float)  # seconds
    for cost in costs:
        kinds[cost.kind] += cost.launches * limit(cost)
    total = sum(kinds.values())
    return {
        "part": part,
        "launches": sum(cost.launches for cost in costs),
        "bytes": sum(cost.launches * bytes_of(cost) for cost in costs),
        "flops": sum(cost.launches * cost.flops for cost in costs),
        "limit_ms": 1e3 * total,
        "kinds": ", ".join(
            f"{kind} {of / total:.0%}"
            for kind, of in sorted(kinds.items(), key=lambda item: -item[1])
            if of > 0.005 * total
        ),
    }
