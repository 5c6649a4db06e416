"""Which kernel variants a propagation runs: the fastest by times of this kind of card, else by the estimate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.choices import VARIANTS, Variants
from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.mosaic import estimate, layouts, measured
from pallas_kernels.mosaic.card import planned_for
from pallas_kernels.mosaic.layouts import Layout

ON_CHIP = "_on_chip"
MODES = ("inference", "training", "backward")


@dataclasses.dataclass(frozen=True)
class Propagation:
    """The properties of a propagation that decide its variants."""

    shape: tuple[int, ...]  # (B, H, W, C) of x
    dtype: str  # of x and the maps; the wider one where they differ
    weight_channels: int
    chunk: int | None
    rank: int  # S of the proxy


def choose(propagation: Propagation, variant: str | None, interpret: bool = False) -> Variants:
    """The variants that run `propagation`.

    Args:
        propagation: its sizes.
        variant: None for the fastest. A named one is taken for inference and training, and for the backward pass too if
            it has one that fits the map; else the backward pass is "scans".
        interpret: whether Pallas' interpreter runs the kernels.

    Raises:
        ValueError: `variant` cannot run this map on this GPU.
    """
    fits = functools.partial(_layout, propagation, interpret=interpret)
    if variant is None:
        return Variants(*(_fastest(propagation, mode, interpret) for mode in MODES))
    if variant != "scans" and not all(fits(variant, mode) for mode in MODES[:2]):
        card = planned_for()
        if not card.multiplies:
            raise ValueError(f"variant: expected one without wgmma, which {card.name} lacks, got {variant!r}")
        of_x = f"x {propagation.shape} {propagation.dtype}, proxy of {propagation.rank} channels"
        raise ValueError(f"variant: expected one that fits {card.name} and {of_x}, got {variant!r}")
    backward = variant.removesuffix(ON_CHIP)
    return Variants(variant, variant, backward if fits(backward, "backward") else "scans")


def seconds(propagation: Propagation, variant: str, mode: str, interpret: bool = False) -> float | None:
    """An estimate of a pass by a variant, with what XLA does around its kernels; None where no tile fits.

    Args:
        propagation: its sizes.
        variant: a name in `VARIANTS`; on chip there is no backward pass.
        mode: "inference", "training" (a forward pass that keeps h) or "backward".
        interpret: whether Pallas' interpreter runs the kernels.
    """
    layout = _layout(propagation, variant, mode, interpret)
    if layout is None:
        return None
    card, rate = planned_for(), estimate.rates(planned_for())
    batch, height, width, channels = propagation.shape
    kernels = sum(estimate.seconds(problem, tile, card, rate) for _, problem, tile in layout.launches)
    size, shared = jnp.dtype(propagation.dtype).itemsize, propagation.weight_channels / channels
    # Values per pixel and channel that XLA's passes read and write; 24 are the maps of all directions.
    maps = 12 * (1 + shared)
    passes = {
        ("scans", "backward"): [maps, 2 + 8 + 8 + 8, 4 + 1 + 1, 2 * maps],  # maps, merge, x, and products
        ("scans", "inference"): [maps, 4 + 4 + 4 + 1 + 1],
        ("low_rank", "backward"): [4 + 1, 2 * maps],
        ("low_rank", "inference"): [4 + 1],
    }
    moved = passes.get((variant, "backward" if mode == "backward" else "inference"), [])
    of_values = batch * height * width * channels * size / rate.bandwidth
    return kernels + sum(values * of_values + rate.launch for values in moved)


def basis(propagation: Propagation) -> str:
    """Where the choice for `propagation` comes from."""
    name = planned_for().name
    return f"measured on an {name}" if measured.nearest(name, propagation) else f"estimated for an {name}, not measured"


@functools.lru_cache(maxsize=4096)
def _fastest_of(propagation: Propagation, mode: str, interpret: bool, card: object) -> str:
    known = measured.nearest(planned_for().name, propagation)
    times = dict(known["milliseconds"].get(mode, {})) if known else {}
    if not times:
        times = {variant: seconds(propagation, variant, mode, interpret) for variant in VARIANTS}
    order = sorted((time, variant) for variant, time in times.items() if time is not None)
    return next((variant for _, variant in order if _layout(propagation, variant, mode, interpret)), "scans")


def _fastest(propagation: Propagation, mode: str, interpret: bool) -> str:
    return _fastest_of(propagation, mode, interpret, planned_for())


def _layout(propagation: Propagation, variant: str, mode: str, interpret: bool) -> Layout | None:
    """The layout of the variant's kernel."""
    kernel = "backward" if mode == "backward" else "forward"
    x = jax.ShapeDtypeStruct(propagation.shape, propagation.dtype)
    if variant == "scans":
        kind = layouts.scan_kind(kernel, x, x, x)
    elif kernel == "backward" and variant.endswith(ON_CHIP):
        return None
    else:
        keep, on_chip = mode != "inference", variant.endswith(ON_CHIP)
        kind = layouts.low_rank_kind(kernel, x, propagation.rank, keep=keep, on_chip=on_chip)
    sizes = propagation.shape, propagation.weight_channels, DIRECTIONS, propagation.chunk
    return layouts.lay_out(kind, *sizes, interpret=interpret)
