"""An exact integer fingerprint of every array of a tree, computed on the devices that hold the array.

It is the sum of bits * weight(position) over all positions, modulo 2^32. Weights are odd, so that any change within one
word changes the sum. Integer sums do not depend on their order, so the result does not depend on the sharding.
"""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprints(tree: Any) -> dict[str, jax.Array]:
    """Returns the () uint32 fingerprint of every leaf by its path. Traceable."""
    return {path: _fingerprint(leaf) for path, leaf in leaves_by_path(tree).items()}


def finite(tree: Any) -> dict[str, jax.Array]:
    """Returns path -> () bool: whether all numbers of the array are finite, for floating-point arrays. Traceable."""
    return {
        path: _is_finite(leaf) for path, leaf in leaves_by_path(tree).items() if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves by their paths, such as `stem/kernel`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


# Compiled for each shape and dtype: a tree of a thousand arrays has few of them.
@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


@jax.jit
def _fingerprint(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    # The weight of a position comes from its linear index, built per axis: a reshape would gather a sharded array.
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        position = position + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    mixed = position * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
    weights = (mixed ^ (mixed >> np.uint32(13))) | np.uint32(1)
    return jnp.sum(words * weights, dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of an array as uint32, with one more axis where a number takes several words."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    size = leaf.dtype.itemsize
    if size > 4:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def sha256_of_arrays(tree: Any) -> str:
    """Returns the SHA-256 of all bytes of a tree of host arrays, in the order of its leaves."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(leaf))
    return total.hexdigest()
