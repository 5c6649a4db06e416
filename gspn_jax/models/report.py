"""What a model consists of, in lines that a person reads at the start of a run."""

import itertools
import math

import jax
from flax import nnx

from gspn_jax.mixers import GSPNMixer
from gspn_jax.models.generator import Generator
from pallas_kernels import record_choices
from pallas_kernels.dispatch import Choice


def parameter_count(model: nnx.Module) -> int:
    """Number of parameters; also of a model built under `nnx.eval_shape`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def layer_report(model: nnx.Module, *inputs: jax.ShapeDtypeStruct) -> list[str]:
    """What each propagation layer runs: one line for layers in a row that agree in everything.

    Args:
      model: called on `inputs`; nothing is computed, only traced.

    Returns:
      lines of the paths, the map, the reach of the scans, the implementation and why it was chosen.
    """
    mixers = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, GSPNMixer)}
    if not mixers:
        return ["no propagation layer"]
    with record_choices() as choices:
        nnx.eval_shape(lambda module, *inputs: module(*inputs), model, *inputs)
    # Layers run in the order of their names, each with as many operations: 1, or 4 scans where maps are unturned.
    names = model.layer_names() if isinstance(model, Generator) else list(mixers)
    alignment = next(iter(mixers.values())).alignment  # of a model, one
    each = len(choices) // len(names)
    described = [(_describe(alignment, choice), name) for name, choice in zip(names, choices[::each], strict=True)]
    lines = []
    for description, group in itertools.groupby(described, key=lambda pair: pair[0]):
        paths = [path for _, path in group]
        lines.append(f"{paths[0] if len(paths) == 1 else f'{paths[0]} to {paths[-1]}'}: {description}")
    return lines


def _describe(alignment: str, choice: Choice) -> str:
    _, height, width, channels = choice.shape
    reach = "global" if choice.chunk is None else f"chunk {choice.chunk}"
    where = f"{height}x{width}x{channels}, {reach}, {alignment}"
    kernels = "" if choice.variants is None else f", {choice.variants}"
    reason = f" ({choice.reason})" if choice.reason else ""
    return f"{choice.operation} {where}: {choice.implementation}{kernels}{reason}"
