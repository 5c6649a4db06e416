"""Starting one run from the parameters of another: takes the arrays that fit and names the others."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from gspn_jax.training.checkpoints.fingerprint import leaves_by_path
from gspn_jax.training.state import Parameters


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The arrays of a source that fit a target.

    Attributes:
        loaded: path -> host array, in the dtype of the target.
        fresh: paths of the target that keep their initial values, each with the reason.
        unused: paths of the source that the target does not have.
    """

    loaded: Mapping[str, np.ndarray]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def report(self) -> list[str]:
        """Returns lines for the console."""
        lines = [f"loaded {len(self.loaded)} arrays, {sum(leaf.size for leaf in self.loaded.values()):,} parameters"]
        lines += [f"  starts fresh: {name}" for name in self.fresh]
        return lines + [f"  not used: {name}" for name in self.unused]


def fit(source: Parameters, target: Parameters) -> Transfer:
    """Matches parameters by path and shape.

    Args:
        source: nested dict of host arrays.
        target: nested dict of arrays or ShapeDtypeStructs.

    Raises:
        ValueError: nothing fits.
    """
    have, want = leaves_by_path(source), leaves_by_path(target)
    loaded: dict[str, np.ndarray] = {}
    fresh: list[str] = []
    for path, leaf in want.items():
        if path not in have:
            fresh.append(f"{path} {tuple(leaf.shape)} (not in the source)")
        elif have[path].shape != leaf.shape:
            fresh.append(f"{path} {tuple(leaf.shape)} (the source has {tuple(have[path].shape)})")
        else:
            loaded[path] = np.asarray(have[path]).astype(leaf.dtype)
    if not loaded:
        raise ValueError(f"source: expected arrays such as {next(iter(want))}, got none that fits the model")
    unused = tuple(f"{path} {tuple(have[path].shape)}" for path in have if path not in want)
    return Transfer(loaded, tuple(fresh), unused)
