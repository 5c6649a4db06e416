"""Training tasks, one file each, behind the protocol `Task`.

To add a task, write its file, and its run in `gspn_jax/runs/`. A batch is a dict of arrays whose first axis is the
batch. The training loop does not read the dict, so a condition may consist of any arrays: labels, token ids, sizes.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import jax
import numpy as np

from gspn_jax.training.state import Parameters

__all__ = ["Task"]


class Task(Protocol):
    """The interface between the training loop and a task."""

    def init(self, key: jax.Array) -> Parameters:
        """Returns fresh parameters: a nested dict of float32 arrays. Traceable."""
        ...

    def loss(self, params: Parameters, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean loss, () float32, and further numbers to report, () each. Traceable.

        Args:
            params: nested dict of float32 arrays.
            batch: arrays (B, ...) by name.
            key: PRNG key of this step.
        """
        ...

    def evaluate(self, params: Parameters, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
        """Returns numbers by name, "images" among them, computed on the mesh set by `jax.set_mesh`."""
        ...
