"""Blocks with parameters stacked on a first axis, so that a `jax.lax.scan` runs all and compiles one."""

from collections.abc import Callable

import jax
from flax import nnx


def stacked[Block: nnx.Module](build: Callable[..., Block], count: int, rngs: nnx.Rngs) -> Block:
    """Returns a block that holds the parameters of `count` blocks, stacked on a first axis.

    Args:
        build: called as build(rngs=...); returns one block.
        count: number of blocks.
        rngs: source of the initial parameters.
    """
    keys = jax.random.split(rngs.params(), count)
    state = jax.vmap(lambda key: nnx.state(build(rngs=nnx.Rngs(key))))(keys)
    return nnx.merge(graph_of(build), state)


def graph_of(build: Callable[..., nnx.Module]) -> nnx.GraphDef:
    """Returns the graph of one block, to be merged with one block's parameters. build: called as build(rngs=...)."""
    return nnx.graphdef(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
