"""An NNX module as two pure functions on a nested dict of arrays with string keys.

Checkpoints and the loop see only the dict and do not depend on NNX.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from gspn_jax.training.state import Parameters


class Functional:
    """Init and apply of the module that `build` makes.

    Args:
        build: NNX rngs -> module; all variables of the module must be `nnx.Param`.

    Raises:
        ValueError: the module has other variables, whose changes a pure function would lose.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self._graphdef, state = nnx.split(module)
        self._variables = dict(nnx.to_flat_state(state))
        others = [path for path, variable in self._variables.items() if not isinstance(variable, nnx.Param)]
        if others:
            raise ValueError(f"build: expected a module of nnx.Param only, got other variables at {others[:3]}")

    def init(self, key: jax.Array) -> Parameters:
        """Returns fresh parameters. Traceable."""
        _, state = nnx.split(self._build(nnx.Rngs(key)))
        return to_nested({_names(path): variable.get_value() for path, variable in nnx.to_flat_state(state)})

    def merge(self, params: Parameters) -> nnx.Module:
        """Returns the module with `params` in it."""
        flat = [(path, variable.replace(_at(params, _names(path)))) for path, variable in self._variables.items()]
        return nnx.merge(self._graphdef, nnx.from_flat_state(flat))

    def apply(self, params: Parameters, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Returns the result of the module, or of one of its methods, with these parameters."""
        return getattr(self.merge(params), method)(*args, **kwargs)


def to_nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Returns the nested dict of a dict whose keys are paths."""
    tree: dict[str, Any] = {}
    for (*folders, leaf), value in flat.items():
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _at(tree: Parameters, path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree
