"""The Inception-v3 of FID, as pytorch-fid and torch-fidelity hold it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from gspn_jax.evaluation.inception import CONVOLUTIONS, Inception
from gspn_jax.weights.torch_layouts import Row, filled, shape_of, unwrapped


def fid_inception(arrays: Mapping[str, Any]) -> Inception:
    """The network of these parameters, a module from uint8 images to features: see `Inception`.

    Args:
      arrays: parameter names to arrays; counters of batches and the bias of the last layer are not used.

    Raises:
      ValueError: a parameter is missing, is left over, or has a shape that does not fit.
    """
    arrays = {
        name: array
        for name, array in unwrapped(arrays).items()
        if not name.endswith("num_batches_tracked") and name != "fc.bias"
    }
    theirs = {name: shape_of(arrays, f"{name}.conv.weight") for name in CONVOLUTIONS}
    for name, shape in theirs.items():
        if len(shape) != 4:
            raise ValueError(f"arrays: expected {name}.conv.weight to have 4 axes, got shape {shape}")
    shapes = {name: (rows, columns, inputs, outputs) for name, (outputs, inputs, rows, columns) in theirs.items()}
    outputs = shape_of(arrays, "fc.weight")[0]
    model = nnx.eval_shape(lambda: Inception(shapes, outputs, rngs=nnx.Rngs(0)))
    return filled(model, _rows(), {name: np.asarray(array) for name, array in arrays.items()}, kind="FID Inception")


def _rows() -> Iterator[Row]:
    for name in CONVOLUTIONS:
        yield ("convs", name, "conv", "kernel"), f"{name}.conv.weight", "conv"
        for ours, theirs in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            yield ("convs", name, "norm", ours), f"{name}.bn.{theirs}", "vector"
    yield ("logits", "kernel"), "fc.weight", "linear"
