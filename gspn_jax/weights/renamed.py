"""Arrays under other names."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Renamed(Mapping[str, Any]):
    """Arrays under other names. Each is read, and changed, when it is asked for.

    Args:
        arrays: names to arrays.
        sources: other names to names in `arrays`.
        changes: other names to functions that make their array of the one in `arrays`; the same array without one.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        sources: Mapping[str, str],
        changes: Mapping[str, Callable[[Any], Any]] | None = None,
    ):
        self._arrays, self._sources, self._changes = arrays, sources, changes or {}

    def __getitem__(self, name: str) -> Any:
        array = self._arrays[self._sources[name]]
        return self._changes[name](array) if name in self._changes else array

    def __contains__(self, name: object) -> bool:  # Mapping's would read the array
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
