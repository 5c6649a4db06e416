"""Row-stochastic weights inside a kernel: `pallas_kernels.stability` in a form with few special functions.

A sigmoid takes one special-function instruction, the power of two; the quotient by the sum of three takes the fourth.
With the card's approximations (2^-22 relative, of the power, and the argument rounded to float32) a weight is within
1e-6 of the exact one.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.stability import LOGIT_FLOOR


def shares(logits: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Sigmoids of three float32 logits times a common factor, and that factor: 1 / a is to 1 / b as b is to a.

    The factor is at most 1.5e35.
    """
    a, b, c = (1.0 + jnp.exp(-jnp.maximum(logit, LOGIT_FLOOR)) for logit in logits)
    ab, bc = a * b, b * c
    return [bc, a * c, ab], ab * c


def weights(parts: list[jax.Array], pixel: jax.Array, length: int) -> list[jax.Array]:
    """Shares of three neighbours, divided by their sum over those that exist; rows sum to 1 exactly.

    Args:
      parts: shares of the neighbours of smaller, same and larger index, float32; any common factor cancels.
      pixel: int32, the index along the line.
      length: of the line.
    """
    smaller = jnp.where(pixel > 0, parts[0], 0.0)
    larger = jnp.where(pixel < length - 1, parts[2], 0.0)
    inverse = 1.0 / (smaller + parts[1] + larger)
    # Adding a half rounds to a grid on which sums are exact; see `stability.normalise`.
    smaller = (smaller * inverse + 0.5) - 0.5
    larger = jnp.minimum((larger * inverse + 0.5) - 0.5, 1.0 - smaller)
    return [smaller, 1.0 - (smaller + larger), larger]


def pass_to_logits(
    logits: list[jax.Array], parts: list[jax.Array], factor: jax.Array, given: list[jax.Array], grads: list[jax.Array]
) -> list[jax.Array]:
    """Gradients of the logits from those of the weights `given`, which came from `shares(logits)`."""
    mean = given[0] * grads[0] + given[1] * grads[1] + given[2] * grads[2]
    inverse = 1.0 / factor
    return [
        jnp.where(logit < LOGIT_FLOOR, 0.0, 1.0 - part * inverse) * (weight * (grad - mean))
        for logit, part, weight, grad in zip(logits, parts, given, grads, strict=True)
    ]
