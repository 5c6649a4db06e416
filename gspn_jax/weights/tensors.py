"""Tensors of checkpoints, read one after another."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from gspn_jax.weights.torch_layouts import bare_names, innermost


class Tensors(Mapping[str, Any]):
    """The tensors of one or several checkpoints by their bare names; each is read when it is asked for.

    Args:
        checkpoints: names to arrays, perhaps with a checkpoint around them. Of two tensors of one name, the later
            checkpoint's counts.
        leave_out: bare names of tensors to leave out.
    """

    def __init__(self, *checkpoints: Mapping[str, Any], leave_out: Collection[str] = ()):
        self._sources = {
            bare: (checkpoint, name)
            for checkpoint in map(innermost, checkpoints)
            for bare, name in bare_names(checkpoint).items()
            if bare not in leave_out
        }

    def __getitem__(self, name: str) -> Any:
        checkpoint, own = self._sources[name]
        return checkpoint[own]

    def __contains__(self, name: object) -> bool:  # Mapping's would read the tensor
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
