"""The least bytes of device memory that a propagation moves, by path and pass: counted, not measured."""

from collections.abc import Iterator
from typing import NamedTuple

from experiments.kernel_limits import Moved
from experiments.kernel_shapes import KernelShape
from pallas_kernels.dispatch import PATHS
from pallas_kernels.mosaic import paths, primitives
from pallas_kernels.mosaic.tiles import MAPS

FORWARD, TRAINING, BACKWARD = "forward", "training forward", "backward"  # the second keeps h for the third
PASSES = (FORWARD, TRAINING, BACKWARD)


def moved_by_kernels(shape: KernelShape, path: str, pass_: str, size: int) -> Moved:
    """By a launch for each direction that adds to a float32 sum; on chip x is read and y written once.

    A proxy is read once for each direction, on chip once in each of two orders. `size`: bytes of a value.
    """
    maps = shape.batch * shape.height * shape.width * shape.channels
    weights = 3 * maps * shape.weight_channels // shape.channels
    is_made, is_on_chip = path.startswith("low_rank"), path.endswith(paths.ON_CHIP)
    of_maps = 3 * maps + weights  # of a direction
    kept = 4 * maps if pass_ == TRAINING else 0  # h
    if is_on_chip:
        values, total = 2 * maps + kept, 0  # x and y
    elif pass_ != BACKWARD:
        # x; the sum is written 3 times and read 3 times, then y written.
        values, total = 4 * maps + kept, (24 + size) * maps
    else:
        # x, h, the gradient of y, and the gradients of the maps: of logits for all channels if the kernel made them.
        values, total = 4 * (3 * maps + (6 * maps if is_made else of_maps)), (24 + size) * maps
    if not is_made:
        return Moved((values + 4 * of_maps) * size + total)
    rank = primitives.round_up(shape.rank, 16)
    proxy = (2 if is_on_chip else 4) * maps // shape.channels * rank
    return Moved(values * size + total, (proxy + 4 * MAPS * rank * shape.channels) * size)


class Chain(NamedTuple):
    """Bytes per pixel and channel, from proxy and x to y or, of the backward pass, to the gradients."""

    path: str
    pass_: str
    making: float  # the proxy is read and the 24 maps are written, where they are not made in the kernel
    kernels: float
    gradients: float  # the products that make the gradients of proxy and projections read those of the maps

    @property
    def total(self) -> float:
        return self.making + self.kernels + self.gradients


def chains(shape: KernelShape) -> Iterator[Chain]:
    """In bfloat16, of every path; first those of separate passes, forward, which normalise to float32 weights."""
    size = 2
    maps = shape.batch * shape.height * shape.width * shape.channels
    ratio = shape.weight_channels / shape.channels
    proxy = size * shape.rank * (1 / shape.channels + 4 * MAPS / (maps / shape.channels))  # with the projections
    making = 4 * size * (3 + 3 * ratio) + proxy
    # A direction: 3 logits to 3 weights; then x, lam, 3 weights and h. All: gate, skip and h of four, x and y.
    separate = 4 * (3 * ratio * (size + 4) + 3 * size + 3 * ratio * 4) + 14 * size
    yield Chain("separate passes", FORWARD, making, separate, 0)
    for path in PATHS:
        for pass_ in PASSES:
            if path.endswith(paths.ON_CHIP) and pass_ == BACKWARD:
                continue
            is_made = path.startswith("low_rank")
            # Two products, and each reads the gradients of 24 maps: of weights for all channels if kernels made them.
            read = 2 * 4 * size * (3 + 3 * (1 if is_made else ratio)) if pass_ == BACKWARD else 0
            kernels = moved_by_kernels(shape, path, pass_, size).total / maps
            yield Chain(path, pass_, 0 if is_made else making, kernels, read)


def markdown(shape: KernelShape) -> list[str]:
    """Lines of a section with the chains of a map."""
    size = f"{shape.batch} x {shape.height} x {shape.width} x {shape.channels}, rank {shape.rank}"
    lines = [
        f"## Bytes from proxy and x to y, or to the gradients, per pixel and channel: {shape.name}, {size}",
        "",
        "| path | pass | making the maps | kernels | products with gradients of maps | sum |",
        "|---|---|---|---|---|---|",
    ]
    for path, pass_, *parts, total in ((*chain, chain.total) for chain in chains(shape)):
        lines.append(f"| {path} | {pass_} | " + " | ".join(f"{size:.1f}" for size in (*parts, total)) + " |")
    return lines
