"""Parameters of the Inception-v3 of FID under the names of pytorch-fid and torch-fidelity."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from gspn_jax.evaluation.inception import CONVOLUTIONS, Inception
from gspn_jax.weights.torch_layouts import Row, filled, shape_of, unwrapped


def fid_inception(arrays: Mapping[str, Any]) -> Inception:
    """Loads the Inception-v3 of FID, which takes uint8 images: see `Inception`.

    Args:
        arrays: parameter names to arrays; counters of batches and the bias of the last layer are not used.

    Raises:
        ValueError: names the parameter that is missing, is left over, does not fit, or holds NaN or Inf.
    """
    arrays = {
        name: array
        for name, array in unwrapped(arrays).items()
        if not name.endswith("num_batches_tracked") and name != "fc.bias"
    }
    shapes = {}
    for name in CONVOLUTIONS:
        outputs, inputs, rows, columns = shape_of(arrays, f"{name}.conv.weight", axes=4)
        shapes[name] = rows, columns, inputs, outputs
    build = functools.partial(Inception, shapes, shape_of(arrays, "fc.weight", axes=2)[0])
    return filled(build, _rows(), arrays, kind="FID Inception")


def _rows() -> Iterator[Row]:
    for name in CONVOLUTIONS:
        yield ("convs", name, "conv", "kernel"), f"{name}.conv.weight", "conv"
        for ours, theirs in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            yield ("convs", name, "norm", ours), f"{name}.bn.{theirs}", "vector"
    yield ("logits", "kernel"), "fc.weight", "linear"
