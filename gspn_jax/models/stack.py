"""Blocks whose parameters are stacked on a first axis, so that a `jax.lax.scan` runs them and compiles one."""

from collections.abc import Callable

import jax
from flax import nnx


def stacked[Block: nnx.Module](build: Callable[..., Block], count: int, rngs: nnx.Rngs) -> Block:
    """A block whose parameters are those of `count`, stacked on a first axis. build: called as build(rngs=...)."""
    keys = jax.random.split(rngs.params(), count)
    state = jax.vmap(lambda key: nnx.state(build(rngs=nnx.Rngs(key))))(keys)
    return nnx.merge(graph_of(build), state)


def graph_of(build: Callable[..., nnx.Module]) -> nnx.GraphDef:
    """What merges with the parameters of one block."""
    return nnx.graphdef(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
