"""How a launch may be tiled into CTAs, warpgroups and lines in flight."""

import dataclasses

from pallas_kernels.mosaic.card import Card

MAPS = 6  # maps of a direction: three logits, lam, gate, skip
SKEW = 8  # padding values at the end of a row of maps in shared memory, so that rows begin in different banks
MULTIPROCESSOR_MEMORY = 228 * 1024
MULTIPROCESSOR_THREADS = 2048
MULTIPROCESSOR_REGISTERS = 65536
_PRODUCT_ROWS = 64  # pixels of one tensor-core instruction
# A thread's registers for each line, and for each pixel and channel that it holds; counted in compiled kernels.
_REGISTERS = {"forward": (25, 5), "backward": (75, 10.5)}


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
        chunks: chunks that the CTA walks one after the other.
    """

    channels: int
    rows: int
    warpgroups: int = 1
    stages: int = 4
    stores: int = 2
    ghost: int = 0
    overlap: bool = True
    chunks: int = 1

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
        chunks = f", {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{self.channels} channels, {self.rows} pixels{warpgroups}, {lines}{ghost}{overlap}{chunks}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The properties of a launch that decide its tile.

    Attributes:
        kernel: "forward" or "backward".
        batch: images.
        lines: lines of the map.
        length: pixels of a line.
        channels: channels of the map.
        chunk: lines of a chunk.
        directions: that the launch walks.
        loads: for each array that is read, bytes per pixel and channel; in a backward kernel h comes last.
        stores: likewise for each array that is written.
        sharing: channels that share a weight.
        adjacent: whether consecutive pixels of a line are consecutive in memory, in any of the directions.
        rank: channels of the proxy from which the kernel makes maps, a multiple of 16; 0 where maps are loaded.
        resident: bytes per pixel and channel that stay in shared memory while a CTA walks all directions; 0 where it
            walks one.
    """

    kernel: str
    batch: int
    lines: int
    length: int
    channels: int
    chunk: int
    directions: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    sharing: int = 1
    adjacent: bool = False
    rank: int = 0
    resident: int = 0

    @property
    def key(self) -> str:
        """Its key in tables of measured tiles."""
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))

    @property
    def moved(self) -> float:
        """Bytes per pixel and channel that a direction reads from device memory and writes to it."""
        # With made maps a backward kernel copies h twice, as its line and as the line before: once from the cache.
        again = self.loads[-1] if self.rank and self.kernel == "backward" else 0
        shared = 12 / self.sharing * (1 + (self.kernel == "backward")) if self.sharing > 1 else 0.0
        resident = (self.resident - 4 + self.stores[0]) / self.directions if self.resident else 0.0
        return sum(self.loads) + sum(self.stores[bool(self.resident) :]) - again + shared + resident

    @property
    def copies(self) -> int:
        """TMA rows of a pixel in a line. Three logits are three rows."""
        return len(self.loads) + len(self.stores) + sum(2 for size in self.loads + self.stores if size % 3 == 0)

    @property
    def chunks(self) -> int:
        """Chunks of a map, in its longer direction."""
        return -(-(self.length if self.resident else self.lines) // self.chunk)

    def sums(self, tile: Tile) -> int:
        """Values of one matrix product."""
        return rows_of_product(tile) * MAPS * tile.channels if self.rank else 0

    def shared_memory(self, tile: Tile) -> int:
        """Bytes of shared memory that a CTA needs."""
        is_backward, elements = self.kernel == "backward", tile.rows * tile.channels
        stages = min(tile.stages, self.chunk * tile.chunks)
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
            buffers = tile.warpgroups * (1 + overlaps(tile, bool(self.resident)))
            arrays += [buffers * product * (MAPS * tile.channels + SKEW) * 2]
        if self.resident:
            arrays += [(self.resident - 4) * tile.rows * elements, 4 * tile.rows * elements]
        arrays += [tile.warpgroups * tile.stores * size for size in results] + [lines]
        # Each array begins at a multiple of 1 KB. Barriers and JAX's space for sums over channels are added.
        sums = 2048 if is_backward and self.sharing > 1 else 0
        return sum(-(-size // 1024) * 1024 for size in arrays) + 8 * (3 * tile.warpgroups * stages + 3) + sums

    def fits(self, tile: Tile, card: Card) -> bool:
        """Whether the kernel is correct with this tile and has enough shared memory and registers."""
        if not all(isinstance(value, int) for value in vars(tile).values()):
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
        # A CTA on chip walks whole maps; a launch that hands its state on has one place for it.
        if not 1 <= tile.chunks <= self.chunks or (self.resident and tile.chunks < self.chunks):
            return False
        if tile.ghost and tile.chunks > 1:
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
        if self.registers(tile) > 240 or self.registers(tile) * 128 * tile.warpgroups > MULTIPROCESSOR_REGISTERS:
            return False
        return self.shared_memory(tile) <= card.shared_memory

    def registers(self, tile: Tile) -> int:
        """An estimate of a thread's registers."""
        line, element = _REGISTERS[self.kernel]
        elements = max(1, tile.rows * tile.channels // 128)
        sums = self.sums(tile) // 128
        if overlaps(tile, bool(self.resident)):
            return int(line + element * elements + 5 * sums / 4)
        return int(max(line + element * elements, line + elements + sums))


def lines_of_product(tile: Tile) -> int:
    """Lines whose maps one matrix product makes."""
    return 1 if tile.ghost or tile.warpgroups > 1 else max(1, _PRODUCT_ROWS // tile.rows)


def overlaps(tile: Tile, on_chip: bool) -> bool:
    """Whether tensor cores make a line's maps during the arithmetic of the line before; not `on_chip`."""
    return tile.overlap and not on_chip and lines_of_product(tile) == 1


def products_ahead(tile: Tile) -> int:
    """Matrix products whose proxy is in shared memory or on its way."""
    return min(tile.stages, 2)


def rows_of_product(tile: Tile) -> int:
    """Pixels of a warpgroup's matrix product."""
    return -(-tile.rows // _PRODUCT_ROWS) * _PRODUCT_ROWS
