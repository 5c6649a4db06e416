"""Runs a function of parameters and arrays on host arrays, batch by batch on the devices of this process."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.models.autoencoder import Autoencoder
from gspn_jax.training.sharding import local_mesh, pad_rows, place_batch, replicate


def batched(compute: Callable[[Any, jax.Array], Any], state: Any, batch_size: int) -> Callable[[np.ndarray], Any]:
    """Returns a function rows -> compute(state, rows) for any number of rows; it compiles once.

    Args:
        compute: (state, array (B, ...)) -> a tree of arrays (B, ...). Traceable.
        state: tree of arrays, such as parameters; replicated on every device.
        batch_size: rows at a time, rounded up to a multiple of the number of devices. The last batch is padded.

    Returns:
        A function of a host array (N, ...), N >= 1, that returns the tree with host arrays (N, ...). It raises
        ValueError for an array without rows.

    Raises:
        ValueError: batch_size is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    mesh = local_mesh()
    rows = -(-batch_size // mesh.size) * mesh.size
    state = replicate(state, mesh)
    compiled = jax.jit(compute)

    def run(array: np.ndarray) -> Any:
        if not len(array):
            raise ValueError(f"array: expected at least one row, got shape {array.shape}")
        found = []
        for start in range(0, len(array), rows):
            part = array[start : start + rows]
            with jax.set_mesh(mesh):
                results = compiled(state, place_batch({"rows": pad_rows(part, rows)}, mesh)["rows"])
            found.append(jax.tree.map(lambda result: np.asarray(result), results))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(array)], *found)

    return run


def image_encoder(model: Autoencoder, batch_size: int = 64) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns the `encode` argument of `gspn_jax.data.encoding.encode_dataset`, on the devices of this process.

    Args:
        model: the autoencoder.
        batch_size: see `batched`.

    Returns:
        images uint8 (B, H, W, 3) -> mean and log variance of their latents, each (B, h, w, C) float32.
    """
    graph, state = nnx.split(model)

    def encode(state: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nnx.merge(graph, state).encode(images.astype(jnp.float32) / 127.5 - 1)

    return batched(encode, state, batch_size)
