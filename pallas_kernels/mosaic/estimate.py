"""An estimate of a kernel's time, to choose tiles and variants where nothing has been measured.

It takes the slowest of the units that a kernel shares: device memory, the TMA units' rows, instruction issue, tensor
cores, and the chain of waits from one line to the next. It adds the start of launches and of CTAs, and follows the CTAs
in waves: 160 CTAs on 132 multiprocessors take as long as 264.
"""

import dataclasses
import math

from pallas_kernels.mosaic import measured
from pallas_kernels.mosaic.card import Card
from pallas_kernels.mosaic.tiles import (
    MULTIPROCESSOR_MEMORY,
    MULTIPROCESSOR_REGISTERS,
    MULTIPROCESSOR_THREADS,
    Problem,
    Tile,
    lines_of_product,
    overlaps,
    products_ahead,
)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a card does in a second, and what a kernel of ours asks of it. Cycles are those of a multiprocessor."""

    # Bytes per second that a large copy reads and writes. Reported for an H200 (data sheet: 4.8e12).
    bandwidth: float = 4.3e12
    # Hz under load. Data sheet: 1.98e9 at most.
    clock: float = 1.7e9
    # Seconds from one launch in a queue to the next, with the filling of its pipeline. An assumption.
    launch: float = 4e-6
    # Cycles before a CTA's first line: barriers, cleared state, the first copy's way. An assumption.
    cta: float = 2000
    # Cycles of a multiprocessor's TMA unit for a row of a copy, whatever its length up to 128 bytes. An assumption.
    row: float = 2.0
    # Seconds from the start of a copy to its arrival. Reported for Hopper under load.
    latency: float = 1e-6
    # Warp instructions of a line, and of each value of it that a thread holds; counted in machine code.
    forward_line: float = 80
    forward_value: float = 40
    backward_line: float = 250
    backward_value: float = 85
    # The part of the latter that is left where a chunk starts, whose weights nobody needs; likewise counted.
    start_share: float = 0.18
    # Warp instructions for each value of a matrix product that a thread holds; likewise counted.
    product_value: float = 1.4
    # Cycles that a warpgroup waits for copies, shared memory and barriers in a line, and for a matrix product.
    line_waits: float = 500
    product_waits: float = 300
    # Cycles per instruction of a warpgroup that runs alone.
    dependent: float = 2.0


_BANDWIDTH = {"NVIDIA H100": 3.0e12}  # reported, by the beginning of a card's name
# Of a product of 64 pixels, columns times terms that tensor cores do in a cycle: the data sheet's 989e12 FLOP/s.
_SUMS_OF_CYCLE = 32


def rates(card: Card) -> Rates:
    """The rates of a card: measured ones where there are, else those above."""
    bandwidth = next((value for name, value in _BANDWIDTH.items() if card.name.startswith(name)), Rates.bandwidth)
    return dataclasses.replace(Rates(bandwidth=bandwidth), **measured.rates(card.name))


def seconds(problem: Problem, tile: Tile, card: Card, rate: Rates | None = None) -> float:
    """An estimate of the time of all launches of the kernel with this tile; `rate` are the card's by default."""
    rate = rate or rates(card)
    chunk, lines = problem.chunk, min(problem.chunk * tile.chunks, problem.lines)
    segments = -(-problem.length // tile.own) if tile.ghost else 1
    launches = -(-lines // tile.ghost) if tile.ghost else 1
    walked = (min(tile.ghost, lines) if tile.ghost else lines) * (problem.directions if problem.resident else 1)
    groups = -(-problem.lines // lines) * (1 if problem.resident else problem.directions)
    ctas = problem.batch * groups * segments * -(-problem.channels // tile.channels)
    together = ctas_of_multiprocessor(problem, tile)
    at_once = together * card.multiprocessors
    full, rest = divmod(ctas, at_once)

    elements = tile.extent * tile.channels / (128 * tile.warpgroups)  # of a thread
    is_forward = problem.kernel == "forward"
    fixed, each = (rate.forward_line, rate.forward_value) if is_forward else (rate.backward_line, rate.backward_value)
    starting = 1 / chunk if chunk < lines else 0.0  # the part of lines in which a chunk starts
    instructions = fixed + each * elements * (1 - starting * (1 - rate.start_share))
    if elements % 4:
        instructions *= 1.5  # vectors shorter than 16 bytes
    waits, tensor = rate.line_waits * (1 + (tile.warpgroups > 1) / 4), 0.0
    ahead = min(tile.stages, lines)
    if problem.rank:
        products = 1 / lines_of_product(tile)  # of a line
        instructions += products * rate.product_value * problem.sums(tile) / 128
        tensor = products * problem.sums(tile) / 64 * problem.rank / _SUMS_OF_CYCLE
        product = products * rate.product_waits + tensor
        if problem.resident:  # lines are not copied
            waits, ahead = waits / 2, lines_of_product(tile) * products_ahead(tile)
        if overlaps(tile, bool(problem.resident)):
            waits += max(0.0, product - waits - rate.dependent * instructions)
        else:
            waits += product
    rows = tile.extent * problem.copies
    row = 1.0 if tile.channels * 2 <= 128 else 2.0
    # Rows shorter than 32 bytes still travel from the cache as whole sectors.
    sectors = 1.5 if tile.channels * 2 < 32 and tile.channels < problem.channels else 1.0
    moved = tile.extent * (tile.channels * problem.moved * sectors + 2 * problem.rank)

    def line(active: int) -> float:
        """Seconds of a line while this many CTAs are active."""
        beside = math.ceil(active / card.multiprocessors)
        return max(
            active * moved / rate.bandwidth,
            beside * rows * row * rate.row / rate.clock,
            beside * tile.warpgroups * instructions / rate.clock,  # a multiprocessor's four parts issue a warp each
            beside * tile.warpgroups * tensor / rate.clock,
            (waits + rate.dependent * instructions) / rate.clock,
            rate.latency / ahead,
        )

    start = rate.cta / rate.clock
    waves = full * (start + walked * line(at_once)) + (start + walked * line(rest) if rest else 0.0)
    return launches * (rate.launch + waves)


def ctas_of_multiprocessor(problem: Problem, tile: Tile) -> int:
    """CTAs that a multiprocessor holds at once, at least 1."""
    threads = 128 * tile.warpgroups
    return max(
        1,
        min(
            MULTIPROCESSOR_MEMORY // (problem.shared_memory(tile) + 1024),
            MULTIPROCESSOR_REGISTERS // (threads * problem.registers(tile)),
            MULTIPROCESSOR_THREADS // threads,
        ),
    )
