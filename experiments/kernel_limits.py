"""Which unit of an H200 limits a kernel: arithmetic with counts of its machine code and nominal rates.

Nothing is measured. Each unit alone, with all multiprocessors at work from the first cycle to the last: waits, bank
conflicts, the last wave of CTAs and the start of a kernel are left out.
"""

import dataclasses
import statistics
from collections.abc import Sequence

from experiments import machine_code
from experiments.deviceless import MULTIPROCESSORS, Kernel
from pallas_kernels.mosaic.forms import Form
from pallas_kernels.mosaic.pipeline import Pipeline
from pallas_kernels.mosaic.tiles import MAPS, lines_of_product, rows_of_product

CLOCK = 1.7e9  # Hz, as in the estimates by which tiles are ranked
COPY_BANDWIDTH = 4.3e12  # bytes a second that a copy reads and writes on an H200; its data sheet says 4.8e12
TENSOR_FLOPS = 8e14  # a second, of 16-bit products; the data sheet says 9.9e14
# Of a multiprocessor in a cycle. An instruction of a warp is 32 lanes.
ISSUE_LANES = 4 * 32
FLOATING_POINT_LANES = 128
SPECIAL_FUNCTION_LANES = 16
SHARED_MEMORY_BYTES = 128
UNITS = ("memory", "issue", "floating_point", "special_functions", "shared_memory", "tensor_cores")


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes of device memory that an operation must move."""

    arrays: int  # x, y, h, maps and their gradients
    proxy: int = 0  # and its factor `up`, where the kernel makes maps of them

    @property
    def total(self) -> int:
        return self.arrays + self.proxy


@dataclasses.dataclass(frozen=True)
class Walk:
    """How the kernel of one direction covers a map (batch, height, width, channels)."""

    form: Form
    pipeline: Pipeline

    @classmethod
    def of(cls, form: Form, height: int, width: int, is_on_chip: bool) -> "Walk":
        shape = form.work.batch, height, width, form.work.channels
        return cls(form, Pipeline(shape, form.direction, None if is_on_chip else form.chunk, form.tile, reverse=False))

    @property
    def ctas(self) -> int:
        walk = self.pipeline
        return walk.batch * walk.chunks * walk.segments * walk.blocks

    @property
    def elements(self) -> int:
        """Pixels times channels that are computed: with padding and ghost zones."""
        return self.ctas // self.pipeline.chunks * self.pipeline.lines * self.form.tile.extent * self.form.tile.channels

    @property
    def products(self) -> float:
        """Products of tensor cores for each line of a CTA. They begin at multiples of their lines in the image."""
        walk, lines = self.pipeline, lines_of_product(self.form.tile)
        order = range(walk.lines - 1, -1, -1) if walk.back else range(walk.lines)
        return len({(n // walk.chunk, line // lines) for n, line in enumerate(order)}) / walk.lines

    def copied(self, moved: float) -> float:
        """Bytes for each computed element that TMA copies into or out of shared memory.

        `moved`: of `Moved.arrays`, for each element and direction. The proxy is copied again for each channel block.
        """
        tile, rank = self.form.tile, self.form.work.rank
        proxy = 2 * rank * self.products * rows_of_product(tile) / (tile.rows * tile.channels)
        lines = min(self.pipeline.chunk, tile.ghost or self.pipeline.chunk)  # of a launch
        up = 2 * rank * MAPS / (lines * tile.extent)
        return moved + proxy + up


def as_all(kernel: Kernel, walks: Sequence[Walk]) -> list[Walk]:
    """The walks of an operation as if the launch of every direction were this kernel.

    Args:
      walks: of its directions; of one kernel, where x and y are resident in shared memory.
    """
    if walks[0].form.work.resident:
        return list(walks)
    same = [walk for walk in walks if (walk.ctas, 128 * walk.form.tile.warpgroups) == (kernel.ctas, kernel.threads)]
    # Where the number of CTAs does not tell them apart, the shared memory that was planned does.
    found = min(same or walks, key=lambda w: abs(w.form.work.shared_memory(w.form.tile) - kernel.shared_memory))
    return [found] * len(walks)


def per_element(kernel: Kernel, walks: Sequence[Walk]) -> machine_code.Mix | None:
    """What a thread issues for an element that it computes; None where there is no line loop to count in.

    Raises:
      LookupError: the product of tensor cores runs once in several lines and is not to be told from the rest.
    """
    form = walks[0].form
    # The results of a line are one group of stores; a thread has the tile's share of them.
    elements = kernel.groups_of_loop * form.tile.rows * form.tile.channels / 128
    if not elements:
        return None
    if form.work.rank and lines_of_product(form.tile) > 1 and not kernel.product_opcodes:
        raise LookupError("no branch around the product of tensor cores")
    products = statistics.fmean(walk.products for walk in walks)
    mix = machine_code.mix(kernel.loop_opcodes, kernel.product_opcodes, products)
    return machine_code.Mix(*(value / elements for value in dataclasses.astuple(mix)))


def microseconds(mix: machine_code.Mix, walks: Sequence[Walk], moved: Moved, elements: int) -> dict[str, float]:
    """Of each unit, for the whole operation; `elements`: of the map."""
    copied = statistics.fmean(walk.copied(moved.arrays / (len(walks) * elements)) for walk in walks)
    cycles = {
        "issue": mix.instructions / ISSUE_LANES,
        "floating_point": mix.floating_point / FLOATING_POINT_LANES,
        "special_functions": mix.special_functions / SPECIAL_FUNCTION_LANES,
        "shared_memory": (mix.shared_memory + mix.tensor_operands + copied) / SHARED_MEMORY_BYTES,
    }
    computed = sum(walk.elements for walk in walks)
    times = {unit: each * computed / (MULTIPROCESSORS * CLOCK) for unit, each in cycles.items()}
    times["memory"] = moved.total / COPY_BANDWIDTH
    times["tensor_cores"] = mix.tensor_flops * computed / TENSOR_FLOPS
    return {unit: 1e6 * times[unit] for unit in UNITS}
