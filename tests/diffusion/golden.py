"""Arrays that reference programs computed, channels last."""

import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "golden"


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as saved:
        arrays = dict(saved)
    return {key: np.moveaxis(array, -3, -1) if array.ndim >= 4 else array for key, array in arrays.items()}


def largest_error(got, want: np.ndarray) -> float:
    """Returns the largest error divided by the largest value."""
    got = np.asarray(got)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got - want).max() / np.abs(want).max())
