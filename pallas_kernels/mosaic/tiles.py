"""How a scan is tiled into CTAs, warpgroups and lines in flight: by measured tiles, else by an estimate."""

import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any

from pallas_kernels.mosaic.card import COPY_BANDWIDTH, Card

MEASURED = pathlib.Path(__file__).with_name("measured_tiles.json")

# Constants of the estimate, for a Hopper GPU.
_CLOCK = 1.7e9  # Hz
# A thread's instructions, counted in compiled kernels with logits: for each line, and for each pixel and channel that
# it holds; and its registers in the same way.
_INSTRUCTIONS = {"forward": (90, 50), "backward": (90, 107)}
_REGISTERS = {"forward": (25, 6), "backward": (35, 12)}
_INSTRUCTIONS_OF_SUM = 1.5  # a thread's instructions for each value of a matrix product
_WAITS = 500  # cycles per line that a warpgroup waits for copies, shared memory and barriers
_WAITS_OF_PRODUCT = 300  # cycles per matrix product that a warpgroup waits, beside the tensor cores' own
_SUMS_OF_CYCLE = 2 * 16  # of a product of 64 pixels, columns times terms that tensor cores do in a cycle
_DEPENDENT = 2  # cycles per instruction of a warpgroup that runs alone
_MEMORY = 1e-6  # seconds from the start of a copy to its arrival
_LAUNCH = 4e-6  # seconds to start a kernel and fill its pipeline
MAPS = 6  # maps of a direction: three logits, lam, gate, skip
SKEW = 8  # padding values at the end of a row of maps in shared memory, so that rows begin in different banks
_PRODUCT_ROWS = 64  # pixels of one tensor-core instruction
_MULTIPROCESSOR_MEMORY = 228 * 1024
_MULTIPROCESSOR_THREADS = 2048
_ALL_REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class Tile:
    """The part of a map that a CTA walks, and how far its copies run ahead.

    Attributes:
        channels: channels of a CTA.
        rows: pixels of a line that one warpgroup works on.
        warpgroups: warpgroups of a CTA, side by side along the line.
        stages: lines that loads run ahead.
        stores: lines of results that may be on their way out.
        ghost: pixels at each end of the CTA's part of the line that it computes although its neighbours own them, and
            the number of lines that a launch walks: each line uses up one ghost pixel, then the next launch reads the
            state again. 0: a CTA owns whole lines.
        overlap: whether tensor cores make the next line's maps while the arithmetic of one line runs, into a second
            buffer; see `overlaps`.
    """

    channels: int
    rows: int
    warpgroups: int = 1
    stages: int = 4
    stores: int = 2
    ghost: int = 0
    overlap: bool = True

    @property
    def extent(self) -> int:
        """Pixels of a line that the CTA computes."""
        return self.rows * self.warpgroups

    @property
    def own(self) -> int:
        """Pixels of a line whose results it writes."""
        return self.extent - 2 * self.ghost

    def __str__(self) -> str:
        warpgroups = f" x{self.warpgroups} warpgroups" if self.warpgroups > 1 else ""
        ghost = f", ghost {self.ghost}" if self.ghost else ""
        overlap = "" if self.overlap else ", no overlap"
        lines = f"{self.stages}+{self.stores} lines"
        return f"{self.channels} channels, {self.rows} pixels{warpgroups}, {lines}{ghost}{overlap}"


@dataclasses.dataclass(frozen=True)
class ScanWork:
    """The properties of a scan that decide its tile.

    Attributes:
        kernel: "forward" or "backward".
        batch: images.
        lines: lines of the map.
        length: pixels of a line.
        channels: channels of the map.
        chunk: lines of a chunk.
        loads: for each array that is read, bytes per pixel and channel; in a backward kernel h comes last.
        stores: likewise for each array that is written.
        sharing: channels that share a weight.
        adjacent: whether consecutive pixels of a line are consecutive in memory.
        rank: channels of the proxy from which the kernel makes maps, a multiple of 16; 0 where maps are loaded.
        resident: bytes per pixel and channel that stay in shared memory while one launch walks four directions; 0 for
            a launch that walks one.
    """

    kernel: str
    batch: int
    lines: int
    length: int
    channels: int
    chunk: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    sharing: int = 1
    adjacent: bool = False
    rank: int = 0
    resident: int = 0

    @property
    def directions(self) -> int:
        """Directions that one launch walks."""
        return 4 if self.resident else 1

    @property
    def key(self) -> str:
        """Its key in the table of measured tiles: the fields as JSON."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def of_key(cls, key: str) -> "ScanWork":
        """The inverse of `key`."""
        fields: Any = (tuple(value) if isinstance(value, list) else value for value in json.loads(key))
        return cls(*fields)

    def shared_memory(self, tile: Tile) -> int:
        """Bytes of shared memory that a CTA needs."""
        is_backward, elements = self.kernel == "backward", tile.rows * tile.channels
        stages = min(tile.stages, self.chunk)
        rings = [elements * size for size in self.loads]
        if is_backward:
            rings[-1] += 3 * max(128, tile.channels * self.loads[-1])  # the margins around h
        results = [elements * size for size in self.stores]
        if self.sharing > 1:
            rings.append(16 * tile.rows)
            results += [16 * tile.rows] * is_backward
        halo = max(1, 32 // tile.channels)
        lines = (4 if is_backward else 2) * 4 * (tile.extent + 2 * halo + 128 // tile.channels) * tile.channels
        arrays = [tile.warpgroups * stages * size for size in rings]
        if self.rank:
            product = rows_of_product(tile)
            arrays += [
                tile.warpgroups * products_ahead(tile) * product * self.rank * 2,
                2 * self.rank * MAPS * tile.channels,
            ]
            buffers = tile.warpgroups * (1 + overlaps(tile, not self.resident))
            arrays += [buffers * product * (MAPS * tile.channels + SKEW) * 2]
        if self.resident:
            arrays += [(self.resident - 4) * tile.rows * elements, 4 * tile.rows * elements]
        arrays += [tile.warpgroups * tile.stores * size for size in results] + [lines]
        # Each array begins at a multiple of 1 KB. Barriers and JAX's space for sums over channels are added.
        sums = 2048 if is_backward and self.sharing > 1 else 0
        return sum(-(-size // 1024) * 1024 for size in arrays) + 8 * (3 * tile.warpgroups * stages + 3) + sums

    def fits(self, tile: Tile, card: Card) -> bool:
        """Whether the kernel is correct with this tile and has enough shared memory and registers."""
        if not all(isinstance(value, int) for value in dataclasses.astuple(tile)):
            return False
        elements = tile.rows * tile.channels
        if elements % 128 or not 128 <= elements <= 2048 or tile.channels not in (8, 16, 32, 64):
            return False
        if not 1 <= tile.warpgroups <= 4 or tile.rows % 8:
            return False
        if min(tile.stages, tile.stores) < 1 or tile.rows > 192:  # with margins, a TMA copy has at most 256
            return False
        if self.sharing > 1 and self.sharing % tile.channels:
            return False
        # A tensor-core instruction has at most 256 columns.
        if self.rank and tile.channels > 32:
            return False
        # TMA drops axes of length 1, and with them the zeros outside the image.
        if self.resident and (tile.ghost or tile.warpgroups > 1 or self.lines > tile.rows or self.lines == 1):
            return False
        if self.length > tile.extent and not tile.ghost:
            return False
        if tile.ghost and (tile.warpgroups > 1 or self.length <= tile.rows or tile.own < tile.ghost + 16):
            return False
        # Copies out of shared memory begin at multiples of 128 bytes; the first pixel that a CTA owns must be one.
        if tile.ghost * tile.channels * 2 % 128 or (tile.ghost and self.sharing > 1 and (tile.ghost | tile.rows) % 32):
            return False
        # A store of a contiguous box becomes a bulk copy, which is not clipped at the end of the line.
        ragged = self.length % tile.own if tile.ghost else self.length != tile.extent
        ragged = ragged or (self.resident and self.lines != tile.extent)
        if self.adjacent and self.channels == tile.channels and ragged:
            return False
        if self.registers(tile) > 240 or self.registers(tile) * 128 * tile.warpgroups > _ALL_REGISTERS:
            return False
        return self.shared_memory(tile) <= card.shared_memory

    def registers(self, tile: Tile) -> int:
        """An estimate of a thread's registers."""
        line, element = _REGISTERS[self.kernel]
        element += 4 * (self.kernel == "backward" and len(self.stores) > 3)  # in a propagation
        elements = max(1, tile.rows * tile.channels // 128)
        sums = self._sums(tile) // 128
        if overlaps(tile, not self.resident):
            return line + element * elements + 5 * sums // 4
        return max(line + element * elements, line + elements + sums)

    def _sums(self, tile: Tile) -> int:
        """Values of one matrix product."""
        return rows_of_product(tile) * MAPS * tile.channels if self.rank else 0

    def seconds(self, tile: Tile, card: Card) -> float:
        """An estimate of the kernel's time, to compare tiles."""
        segments = -(-self.length // tile.own) if tile.ghost else 1
        launches = -(-self.chunk // tile.ghost) if tile.ghost else 1
        lines = min(tile.ghost, self.chunk) if tile.ghost else self.chunk
        ctas = self.batch * -(-self.lines // self.chunk) * segments * -(-self.channels // tile.channels)
        threads = 128 * tile.warpgroups
        resident = min(
            _MULTIPROCESSOR_MEMORY // (self.shared_memory(tile) + 1024),
            _ALL_REGISTERS // (threads * self.registers(tile)),
            _MULTIPROCESSOR_THREADS // threads,
        )
        slots = max(1, resident) * card.multiprocessors
        waves = -(-ctas // slots)
        active = -(-ctas // waves)
        elements = tile.extent * tile.channels
        fixed, each = _INSTRUCTIONS[self.kernel]
        waits = _WAITS * (1 + (tile.warpgroups > 1) / 4)
        if self.rank and self.resident:  # lines are not copied
            fixed, waits = fixed / 2, waits / 2
        instructions = fixed + each * elements / threads
        if elements // threads % 4:
            instructions *= 1.5  # vectors shorter than 16 bytes
        overlapping, tensor = overlaps(tile, not self.resident), 0
        moved, ahead = elements * sum(self.loads + self.stores), min(tile.stages, self.chunk)
        if self.rank:
            products = 1 / lines_of_product(tile)  # of a line
            instructions += products * _INSTRUCTIONS_OF_SUM * self._sums(tile) / 128
            tensor = products * self._sums(tile) / _PRODUCT_ROWS * self.rank / _SUMS_OF_CYCLE
            product = products * _WAITS_OF_PRODUCT + tensor
            waits += max(0, product - waits - _DEPENDENT * instructions) if overlapping else product
            moved += 2 * self.rank * tile.extent
            if self.resident:
                ahead = lines_of_product(tile) * products_ahead(tile)
        together = -(-active // card.multiprocessors) * tile.warpgroups
        half_sectors = tile.channels * 2 < 32 and tile.channels < self.channels
        line = max(
            # Rows shorter than 32 bytes still travel from the cache as whole sectors.
            active * moved * (1.5 if half_sectors else 1) / COPY_BANDWIDTH,
            together * instructions / _CLOCK,  # a multiprocessor issues one warpgroup instruction per cycle
            together * tensor / _CLOCK,
            (waits + _DEPENDENT * instructions) / _CLOCK,
            _MEMORY / ahead,
        )
        return launches * (_LAUNCH + waves * self.directions * lines * line)


def lines_of_product(tile: Tile) -> int:
    """Lines whose maps one matrix product makes."""
    return 1 if tile.ghost or tile.warpgroups > 1 else max(1, _PRODUCT_ROWS // tile.rows)


def overlaps(tile: Tile, one_direction: bool) -> bool:
    """Whether tensor cores make a line's maps during the arithmetic of the line before.

    Args:
        tile: of the kernel.
        one_direction: whether the kernel walks only one direction.
    """
    return tile.overlap and one_direction and lines_of_product(tile) == 1


def products_ahead(tile: Tile) -> int:
    """Matrix products whose proxy is in shared memory or on its way."""
    return min(tile.stages, 2)


def rows_of_product(tile: Tile) -> int:
    """Pixels of a warpgroup's matrix product."""
    return -(-tile.rows // _PRODUCT_ROWS) * _PRODUCT_ROWS


def candidates(work: ScanWork, card: Card, most_warpgroups: int = 4) -> list[Tile]:
    """All tiles that fit `work` on `card`."""
    tiles = (
        Tile(channels, rows, warpgroups, stages, stores, ghost, overlap)
        for channels, rows, warpgroups, stages, stores, ghost, overlap in itertools.product(
            (8, 16, 32, 64),
            (8, 16, 24, 32, 48, 64, 96, 128, 192),
            (1, 2, 3, 4),
            (1, 2, 3, 4, 6),
            (1, 2),
            (0, 16, 32, 64),
            (True, False) if work.rank and not work.resident else (True,),
        )
        if warpgroups <= most_warpgroups and (stages > 1 or (work.rank and work.resident))
    )
    return [tile for tile in tiles if (tile.overlap or lines_of_product(tile) == 1) and work.fits(tile, card)]


@functools.lru_cache(maxsize=4096)
def plan(work: ScanWork, card: Card, most_warpgroups: int = 4) -> Tile | None:
    """The fastest tile that fits: the measured one, else by the estimate. None if no tile fits."""
    measured = _measured().get(card.name, {}).get(work.key)
    if measured and measured["warpgroups"] <= most_warpgroups:
        return Tile(**measured)
    seconds = {tile: work.seconds(tile, card) for tile in candidates(work, card, most_warpgroups)}
    if not seconds:
        return None
    best = min(seconds.values())
    # Among tiles within the estimate's precision: whole sectors of memory first, then more copies ahead, then overlap.
    near = [tile for tile in seconds if seconds[tile] <= 1.03 * best]
    return max(
        near,
        key=lambda tile: (min(tile.channels, 16), tile.stores, min(tile.stages, 4), tile.overlap, -seconds[tile]),
    )


@functools.cache
def _measured() -> dict[str, dict[str, dict[str, Any]]]:
    """By GPU name and `ScanWork.key`, the fields of the fastest tile."""
    return json.loads(MEASURED.read_text())
