"""How a scan is cut into CTAs, warpgroups and lines in flight: a measured tile where there is one, else an estimate."""

import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any

from pallas_kernels.mosaic.card import COPY_BANDWIDTH, Card

MEASURED = pathlib.Path(__file__).with_name("measured_tiles.json")

# The estimate's constants, for a Hopper card. They rank tiles; they are not promises of time.
_CLOCK = 1.7e9  # Hz
# Counted in compiled kernels with logits: instructions of a thread for each line, and for each pixel and channel that
# it holds, and its registers likewise.
_INSTRUCTIONS = {"forward": (90, 50), "backward": (90, 107)}
_REGISTERS = {"forward": (25, 6), "backward": (35, 12)}
_INSTRUCTIONS_OF_SUM = 1.5  # of a thread for each value of a product of tensor cores
_WAITS = 500  # cycles of a line in which a warpgroup waits: copies, shared memory, barriers
_WAITS_OF_PRODUCT = 300  # cycles besides those of the tensor cores, which take 64 x 2 columns x 16 in one
_SUMS_OF_CYCLE = 2 * 16
_DEPENDENT = 2  # cycles per instruction of a warpgroup that is alone
_MEMORY = 1e-6  # seconds from the start of a copy to its data
_LAUNCH = 4e-6  # seconds to start a kernel and fill its pipeline
MAPS = 6  # of a direction: three logits, lam, gate, skip
SKEW = 8  # values at the end of a row of maps in shared memory, so that rows begin in different banks
_PRODUCT_ROWS = 64  # pixels that tensor cores work on at once
_MULTIPROCESSOR_MEMORY = 228 * 1024
_MULTIPROCESSOR_THREADS = 2048
_ALL_REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class Tile:
    """The part of a map that a CTA walks, and how far its copies run ahead."""

    channels: int  # of a CTA
    rows: int  # pixels of a line that one warpgroup works on
    warpgroups: int = 1  # side by side along the line
    stages: int = 4  # lines that loads run ahead
    stores: int = 2  # lines of results that may be on their way out
    # Pixels at each end of a CTA's part of the line that its neighbours own and it computes as well, and the lines of
    # a launch: after so many the ghost zone is used up and the state is exchanged. 0: a CTA owns whole lines.
    ghost: int = 0
    # Tensor cores make the maps of the next line during the arithmetic of one, into a second buffer; see `overlaps`.
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
class Work:
    """One scan, as far as its tile depends on it."""

    kernel: str  # "forward" or "backward"
    batch: int
    lines: int
    length: int  # pixels of a line
    channels: int
    chunk: int  # lines of a chunk
    loads: tuple[int, ...]  # bytes read per pixel and channel of each array; of a backward kernel h comes last
    stores: tuple[int, ...]  # bytes written, likewise
    sharing: int = 1  # channels that share a weight
    adjacent: bool = False  # pixels of a line are neighbours in memory, channels between them aside
    rank: int = 0  # of the proxy that maps are made of in the kernel, a multiple of 16; 0 where they are loaded
    resident: int = 0  # bytes per pixel and channel that stay in shared memory while four directions are walked

    @property
    def directions(self) -> int:
        """That one launch walks."""
        return 4 if self.resident else 1

    @property
    def key(self) -> str:
        """Its name in the table of measured tiles: the fields as JSON."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def of_key(cls, key: str) -> "Work":
        """The inverse of `key`."""
        fields: Any = (tuple(value) if isinstance(value, list) else value for value in json.loads(key))
        return cls(*fields)

    def shared_memory(self, tile: Tile) -> int:
        """Bytes that a CTA needs."""
        is_backward, elements = self.kernel == "backward", tile.rows * tile.channels
        stages = min(tile.stages, self.chunk)
        rings = [elements * size for size in self.loads]
        if is_backward:
            rings[-1] += 3 * max(128, tile.channels * self.loads[-1])  # margins of h
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
        # Each begins at a multiple of 1 KB. Barriers; and JAX's room for sums over channels.
        sums = 2048 if is_backward and self.sharing > 1 else 0
        return sum(-(-size // 1024) * 1024 for size in arrays) + 8 * (3 * tile.warpgroups * stages + 3) + sums

    def fits(self, tile: Tile, card: Card) -> bool:
        """Whether the kernel is right with this tile, and its shared memory and registers suffice."""
        if not all(isinstance(value, int) for value in dataclasses.astuple(tile)):
            return False
        elements = tile.rows * tile.channels
        if elements % 128 or not 128 <= elements <= 2048 or tile.channels not in (8, 16, 32, 64):
            return False
        if not 1 <= tile.warpgroups <= 4 or tile.rows % 8:
            return False
        if min(tile.stages, tile.stores) < 1 or tile.rows > 192:  # with its margins a copy has 256 pixels at most
            return False
        if self.sharing > 1 and self.sharing % tile.channels:
            return False
        # A product of tensor cores has 256 columns at most.
        if self.rank and tile.channels > 32:
            return False
        # TMA drops axes of length 1, and with them what lies outside of the image.
        if self.resident and (tile.ghost or tile.warpgroups > 1 or self.lines > tile.rows or self.lines == 1):
            return False
        if self.length > tile.extent and not tile.ghost:
            return False
        if tile.ghost and (tile.warpgroups > 1 or self.length <= tile.rows or tile.own < tile.ghost + 16):
            return False
        # Copies out of shared memory begin at multiples of 128 bytes: at the first pixel that a CTA owns.
        if tile.ghost * tile.channels * 2 % 128 or (tile.ghost and self.sharing > 1 and (tile.ghost | tile.rows) % 32):
            return False
        # A store whose box has no gaps in memory is one bulk copy and is not clipped at the end of the line.
        ragged = self.length % tile.own if tile.ghost else self.length != tile.extent
        ragged = ragged or (self.resident and self.lines != tile.extent)
        if self.adjacent and self.channels == tile.channels and ragged:
            return False
        if self.registers(tile) > 240 or self.registers(tile) * 128 * tile.warpgroups > _ALL_REGISTERS:
            return False
        return self.shared_memory(tile) <= card.shared_memory

    def registers(self, tile: Tile) -> int:
        """An estimate, per thread."""
        line, element = _REGISTERS[self.kernel]
        element += 4 * (self.kernel == "backward" and len(self.stores) > 3)  # as in propagation
        elements = max(1, tile.rows * tile.channels // 128)
        sums = self._sums(tile) // 128
        if overlaps(tile, not self.resident):
            return line + element * elements + 5 * sums // 4
        return max(line + element * elements, line + elements + sums)

    def _sums(self, tile: Tile) -> int:
        """Values of a product of tensor cores."""
        return rows_of_product(tile) * MAPS * tile.channels if self.rank else 0

    def seconds(self, tile: Tile, card: Card) -> float:
        """An estimate of the time, by which tiles are compared."""
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
        if self.rank and self.resident:  # no copies of lines
            fixed, waits = fixed / 2, waits / 2
        instructions = fixed + each * elements / threads
        if elements // threads % 4:
            instructions *= 1.5  # vectors of less than 16 bytes
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
            # Of rows of less than 32 bytes, whole sectors travel from the cache.
            active * moved * (1.5 if half_sectors else 1) / COPY_BANDWIDTH,
            together * instructions / _CLOCK,  # a multiprocessor issues one instruction of a warpgroup in a cycle
            together * tensor / _CLOCK,
            (waits + _DEPENDENT * instructions) / _CLOCK,
            _MEMORY / ahead,
        )
        return launches * (_LAUNCH + waves * self.directions * lines * line)


def lines_of_product(tile: Tile) -> int:
    """Lines whose maps one product of tensor cores makes."""
    return 1 if tile.ghost or tile.warpgroups > 1 else max(1, _PRODUCT_ROWS // tile.rows)


def overlaps(tile: Tile, alone: bool) -> bool:
    """Whether tensor cores make the maps of a line during the arithmetic of another; `alone`: in a kernel of one
    direction."""
    return tile.overlap and alone and lines_of_product(tile) == 1


def products_ahead(tile: Tile) -> int:
    """Products whose proxy is in shared memory or on its way."""
    return min(tile.stages, 2)


def rows_of_product(tile: Tile) -> int:
    """Pixels of a warpgroup's product."""
    return -(-tile.rows // _PRODUCT_ROWS) * _PRODUCT_ROWS


def candidates(work: Work, card: Card, most_warpgroups: int = 4) -> list[Tile]:
    """All tiles that serve `work` on `card`."""
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
def plan(work: Work, card: Card, most_warpgroups: int = 4) -> Tile | None:
    """The tile that a scan runs with; None if none serves it as it is (a channel block of all channels, ragged)."""
    measured = _measured().get(card.name, {}).get(work.key)
    if measured and measured["warpgroups"] <= most_warpgroups:
        return Tile(**measured)
    seconds = {tile: work.seconds(tile, card) for tile in candidates(work, card, most_warpgroups)}
    if not seconds:
        return None
    best = min(seconds.values())
    # Of those that the estimate cannot tell apart: whole sectors of memory, then more on its way, then overlap.
    near = [tile for tile in seconds if seconds[tile] <= 1.03 * best]
    return max(
        near,
        key=lambda tile: (min(tile.channels, 16), tile.stores, min(tile.stages, 4), tile.overlap, -seconds[tile]),
    )


@functools.cache
def _measured() -> dict[str, dict[str, dict[str, Any]]]:
    """Card name to `Work.key` to the fields of the fastest tile."""
    return json.loads(MEASURED.read_text())
