"""What the benchmark of the kernels compares: line scans by every implementation, attention, linear attention.

Imports jax and pallas_kernels only.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from experiments.kernel_shapes import KernelShape

HEAD_WIDTH = 64
# Two seconds or more of a card that makes 600 Tflop/s: above it attention is left out, with this as the reason.
MOST_ATTENTION_FLOPS = 2e15
MOST_SCORE_BYTES = 2**34


@dataclasses.dataclass(frozen=True)
class Contender:
    """One line of a figure. `function` is called with the inputs of `operation` and a direction."""

    name: str
    operation: str  # "from_logits", "from_weights", "softmax" or "linear"
    implementation: str
    function: Callable[..., jax.Array]

    @property
    def scans(self) -> bool:
        return self.operation.startswith("from_")


def _scan(operation: str, implementation: str) -> Callable[..., jax.Array]:
    scan = {"from_logits": pallas_kernels.line_scan_from_logits, "from_weights": pallas_kernels.line_scan}[operation]
    return functools.partial(scan, implementation=implementation)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: Any) -> jax.Array:
    """Softmax attention of all tokens to all; (B, tokens, heads, 64) each."""
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention with the feature map ELU + 1, two matrix products; (B, tokens, heads, 64) each."""
    q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    summary = product("bnhd,bnhe->bhde", k, v).astype(q.dtype)
    total = product("bnhd,bhd->bnh", q, jnp.sum(k, axis=1, dtype=jnp.float32).astype(q.dtype))
    return (product("bnhd,bhde->bnhe", q, summary) / total[..., None]).astype(v.dtype)


def _contenders() -> dict[str, Contender]:
    listed = []
    for implementation in ("mosaic", "mosaic_interpret", "xla"):
        for operation, suffix in (("from_logits", ""), ("from_weights", "_weights")):
            name = implementation + suffix
            listed.append(Contender(name, operation, implementation, _scan(operation, implementation)))
    for name, implementation in (("flash_attention", "cudnn"), ("softmax_attention", "xla")):
        attention = functools.partial(softmax_attention, implementation=implementation)
        listed.append(Contender(name, "softmax", implementation, attention))
    listed.append(Contender("linear_attention", "linear", "xla", linear_attention))
    return {contender.name: contender for contender in listed}


CONTENDERS = _contenders()


def bind(contender: Contender, direction: str, chunk: int | None) -> Callable[..., jax.Array]:
    """The contender as a function of its inputs alone."""
    if contender.scans:
        return functools.partial(contender.function, direction=direction, chunk=chunk)
    return contender.function


def reason_against(contender: Contender, shape: KernelShape, dtype: str, pass_: str) -> str | None:
    """Why the contender cannot run at the shape here; None if it can."""
    if contender.scans:
        known = pallas_kernels.implementations()
        return known[contender.implementation]
    tokens, heads = shape.height * shape.width, attention_heads(shape)
    if contender.name == "flash_attention" and jax.default_backend() != "gpu":
        return "cuDNN needs a GPU"
    if contender.name == "flash_attention" and dtype == "float32":
        return "cuDNN's flash attention takes 16-bit inputs"
    if contender.name == "softmax_attention" and 4 * shape.batch * heads * tokens**2 > MOST_SCORE_BYTES:
        return f"too many tokens: its scores take {4 * shape.batch * heads * tokens**2 / 2**30:.0f} GiB"
    if contender.operation == "softmax":
        flops = 4 * shape.batch * tokens**2 * heads * HEAD_WIDTH * {"forward": 1, "backward": 2.5, "both": 3.5}[pass_]
        if flops > MOST_ATTENTION_FLOPS:
            return f"too many tokens: {flops / 1e15:.1f} Pflop"
    return None


def attention_heads(shape: KernelShape) -> int:
    """Heads of 64 channels that hold the map's channels; the last one is rounded up to a whole head."""
    return math.ceil(shape.channels / HEAD_WIDTH)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Random numbers of an array of two axes or more."""
    # In pieces: random bits of the largest arrays would take more memory than the arrays.
    lines = shape[0] * shape[1]
    pieces = max(n for n in range(1, min(lines, 64) + 1) if lines % n == 0)
    draw = functools.partial(jax.random.normal, shape=(lines // pieces, *shape[2:]), dtype=jnp.dtype(dtype))
    return jax.lax.map(lambda k: draw(k), jax.random.split(key, pieces)).reshape(shape)


def draw_inputs(key: jax.Array, operation: str, shape: KernelShape, dtype: str, direction: str) -> list[jax.Array]:
    """Random inputs of an operation, and last a random gradient of its result.

    Scans: x, logits or weights, lam, gradient. Attention: q, k, v, gradient, (B, H * W, heads, 64) each.
    """
    keys = jax.random.split(key, 4)
    if not operation.startswith("from_"):
        tokens = (shape.batch, shape.height * shape.width, attention_heads(shape), HEAD_WIDTH)
        return [normal(k, tokens, dtype) for k in keys]
    maps = (shape.batch, shape.height, shape.width, shape.channels)
    logits = normal(keys[1], (*maps[:3], 3, shape.weight_channels), dtype)
    if operation == "from_weights":
        logits = jax.jit(functools.partial(pallas_kernels.row_stochastic, direction=direction))(logits)
    return [normal(keys[0], maps, dtype), logits, normal(keys[2], maps, dtype), normal(keys[3], maps, dtype)]


def bytes_moved(operation: str, shape: KernelShape, dtype: str, pass_: str) -> int:
    """The least bytes that an operation reads and writes in device memory: every input once, every result once.

    With E = B H W C values in a map and E_w = 3 B H W C_w in the weights or their logits:

    | pass | reads | writes |
    |---|---|---|
    | scan, forward | x, lam: 2 E; E_w | h: E |
    | scan, backward | x, lam, h, gradient: 4 E; E_w | gradients of x, lam: 2 E; E_w |
    | attention, forward | q, k, v: 3 T | T |
    | attention, backward | q, k, v, gradient: 4 T, and the result of softmax attention: T | 3 T |

    T = B H W times the channels of whole heads. "both" is the sum: what the forward pass leaves is read again. Weights
    are float32, everything else has the dtype. Padding and what an implementation keeps besides do not count.
    """
    size = jnp.dtype(dtype).itemsize
    pixels = shape.batch * shape.height * shape.width
    if operation.startswith("from_"):
        maps = pixels * shape.channels * size
        weights = 3 * pixels * shape.weight_channels * (size if operation == "from_logits" else 4)
        forward, backward = 3 * maps + weights, 6 * maps + 2 * weights
    else:
        maps = pixels * attention_heads(shape) * HEAD_WIDTH * size
        forward, backward = 4 * maps, (8 if operation == "softmax" else 7) * maps
    return {"forward": forward, "backward": backward, "both": forward + backward}[pass_]
