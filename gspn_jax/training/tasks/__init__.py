"""Tasks: what a network is trained to do. One file each, all behind the protocol `Task`.

To add a task, write its file, and its run in `gspn_jax/runs/`. A batch is a dict of arrays whose first axis is the
batch; the loop does not look into it, so that a condition may be any number of arrays: labels, token ids, sizes.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import jax
import numpy as np

from gspn_jax.training.state import Parameters

__all__ = ["Task"]


class Task(Protocol):
    """What the training loop needs of a task."""

    def init(self, key: jax.Array) -> Parameters:
        """Returns fresh parameters: a nested dict of float32 arrays. Traceable."""
        ...

    def loss(self, params: Parameters, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean loss, () float32, and further numbers to report. Traceable."""
        ...

    def evaluate(self, params: Parameters, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
        """Returns numbers by name, "images" among them, on the mesh that `jax.set_mesh` has set."""
        ...
