"""Attention that scans and mixers are compared with: softmax attention and linear attention."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.shapes import KernelShape

HEAD_WIDTH = 64
IMPLEMENTATIONS = {"flash_attention": "cudnn", "softmax_attention": "xla"}
CANDIDATES = (*IMPLEMENTATIONS, "linear_attention")
# Above it, attention takes a card of 600 Tflop/s two seconds or more, and is left out.
MOST_FLOPS = 2e15
MOST_SCORE_BYTES = 2**34


def heads(channels: int) -> int:
    """Returns the heads of 64 channels that hold a map's channels; the last head may have channels to spare."""
    return math.ceil(channels / HEAD_WIDTH)


def attend(candidate: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attends from all tokens to all.

    Args:
        candidate: of `CANDIDATES`.
        q, k, v: (B, tokens, heads, 64).

    Returns:
        (B, tokens, heads, 64).
    """
    if candidate in IMPLEMENTATIONS:
        implementation: Any = IMPLEMENTATIONS[candidate]
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    # Linear attention with the feature map ELU + 1.
    q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    summary = product("bnhd,bnhe->bhde", k, v).astype(q.dtype)
    total = product("bnhd,bhd->bnh", q, jnp.sum(k, axis=1, dtype=jnp.float32).astype(q.dtype))
    return (product("bnhd,bhde->bnhe", q, summary) / total[..., None]).astype(v.dtype)


def reason_against(candidate: str, shape: KernelShape, dtype: str, pass_: str) -> str | None:
    """Returns why an attention cannot run at the shape on this machine, or None."""
    tokens, count = shape.height * shape.width, heads(shape.channels)
    if candidate == "flash_attention" and jax.default_backend() != "gpu":
        return "cuDNN needs a GPU"
    if candidate == "flash_attention" and dtype == "float32":
        return "cuDNN's flash attention takes 16-bit inputs"
    if candidate == "softmax_attention" and 4 * shape.batch * count * tokens**2 > MOST_SCORE_BYTES:
        return f"too many tokens: its scores take {4 * shape.batch * count * tokens**2 / 2**30:.0f} GiB"
    flops = 4 * shape.batch * tokens**2 * count * HEAD_WIDTH * {"forward": 1, "backward": 2.5, "both": 3.5}[pass_]
    if candidate in IMPLEMENTATIONS and flops > MOST_FLOPS:
        return f"too many tokens: {flops / 1e15:.1f} Pflop"
    return None


def remark(channels: int) -> str:
    return f"{heads(channels)} heads of {HEAD_WIDTH} for {channels} channels"
