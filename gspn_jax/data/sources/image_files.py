"""Image files by name, without labels."""

import os
from collections.abc import Sequence

from gspn_jax.data.decoding import read_file
from gspn_jax.data.sources.protocol import FileSource


class ImageFiles(FileSource):
    """A source of named files, such as those to predict; every label is 0."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]):
        self.paths = [os.fspath(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, index: int, /) -> tuple[bytes, int]:
        return read_file(self.paths[index]), 0

    def describe(self, index: int, /) -> str:
        return self.paths[index]
