"""Reports about a model, printed at the start of a run: parameter count and implementation of each layer."""

import itertools
import math

import jax
from flax import nnx

from pallas_kernels import record_choices
from pallas_kernels.choices import Choice


def parameter_count(model: nnx.Module) -> int:
    """Returns the number of parameters; the model may be abstract, built under `nnx.eval_shape`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def layer_report(model: nnx.Module, *inputs: jax.ShapeDtypeStruct) -> list[str]:
    """Describes the implementation that each line scan and propagation of a model uses.

    Args:
        model: any module; it is traced on `inputs` and computes nothing.
        inputs: shapes and dtypes of its arguments.

    Returns:
        One line for each sequence of equal layers: their names, the map's size, chunk or global, the implementation and
        the reason for it. `pallas_kernels.named_layer` names layers; operations outside it are numbered.
    """
    with record_choices() as choices:
        nnx.eval_shape(lambda module, *inputs: module(*inputs), model, *inputs)
    if not choices:
        return ["no propagation layer"]
    named = [(_describe(choice), choice.layer or f"operation {i}") for i, choice in enumerate(choices)]
    lines = []
    for description, group in itertools.groupby(named, key=lambda pair: pair[0]):
        names = list(dict.fromkeys(name for _, name in group))  # a layer may run several operations
        lines.append(f"{_span(names)}: {description}")
    return lines


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _describe(choice: Choice) -> str:
    _, height, width, channels = choice.shape
    reach = "global" if choice.chunk is None else f"chunk {choice.chunk}"
    variants = "" if choice.variants is None else f", {choice.variants}"
    reason = f" ({choice.reason})" if choice.reason else ""
    return f"{choice.operation} {height}x{width}x{channels}, {reach}: {choice.implementation}{variants}{reason}"
