"""Random access to TFRecord files, which have no index of their own.

A record is its length (8 bytes, little endian), a checksum of the length (4), the data, a checksum of the data (4).
"""

import os
import struct
from collections.abc import Sequence
from concurrent import futures

import numpy as np

_HEAD = struct.Struct("<QI")
_FOOT = 4
_READERS = 16  # threads: finding the records waits for the disk, not for the processor


class TFRecords:
    """The records of several files in order, by index. Thread-safe, picklable."""

    def __init__(self, files: Sequence[str], lengths: np.ndarray):
        """Reads the header of every record once, several files at a time.

        Args:
            files: the shards, in order.
            lengths: how many records each shard has.

        Raises:
            ValueError: a shard is cut off or does not hold as many records as it should.
        """
        self.files = list(files)
        with futures.ThreadPoolExecutor(_READERS) as pool:
            offsets = list(pool.map(_offsets, self.files, (int(length) for length in lengths)))
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.offsets = np.concatenate([*offsets, np.zeros((0, 2), np.int64)])

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        file = self.files[int(np.searchsorted(self.starts, index, side="right")) - 1]
        offset, size = (int(number) for number in self.offsets[index])
        with open(file, "rb") as opened:
            opened.seek(offset)
            return opened.read(size)


def _offsets(file: str, expected: int) -> np.ndarray:
    """Returns the offset and length of each record's data: int64 (expected, 2)."""
    found = []
    end = os.path.getsize(file)
    with open(file, "rb", buffering=0) as opened:
        position = 0
        while position < end:
            head = os.pread(opened.fileno(), _HEAD.size, position)
            size = _HEAD.unpack(head)[0] if len(head) == _HEAD.size else end
            found.append((position + _HEAD.size, size))
            position += _HEAD.size + size + _FOOT
    if position != end or len(found) != expected:
        raise ValueError(
            f"{file}: expected {expected} whole TFRecords, got {len(found)} in {end} bytes, or a cut-off file"
        )
    return np.array(found, np.int64).reshape(-1, 2)
