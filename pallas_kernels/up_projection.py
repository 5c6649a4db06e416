"""The maps of propagation as linear functions of a low-rank proxy (GSPN, section 3; figure 2)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import state_dtype


class UpProjection(NamedTuple):
    """From a proxy of S channels to the maps of the four directions, in the order of `DIRECTIONS`.

    Attributes:
      logits: (S, 4, 3, C_w), C_w a divisor of C.
      lam, gate, skip: (S, 4, C); skip may be None.
    """

    logits: jax.Array
    lam: jax.Array
    gate: jax.Array
    skip: jax.Array | None


def maps_of(proxy: jax.Array, up: UpProjection) -> tuple[jax.Array, Any, Any, Any]:
    """logits (B, H, W, 4, 3, C_w), lam, gate and skip (B, H, W, 4, C) of a proxy (B, H, W, S), in its dtype."""
    lam, gate, skip = (None if array is None else jnp.einsum("bhws,sdc->bhwdc", proxy, array) for array in up[1:])
    return jnp.einsum("bhws,sdkc->bhwdkc", proxy, up.logits), lam, gate, skip


def gradients_of_maps(proxy: jax.Array, up: UpProjection, grads: tuple) -> tuple[jax.Array, UpProjection]:
    """Gradients of proxy and up, float32 (float64 for float64), from those of `maps_of`.

    `grads[0]` may have a logit for each of more channels than C_w, as if each column were repeated.
    """
    dtype = state_dtype(proxy)
    weight_channels, channels = up.logits.shape[-1], grads[0].shape[-1]
    columns: list[Any] = [jnp.repeat(up.logits, channels // weight_channels, axis=-1), *up[1:]]
    of_proxy: Any = jnp.zeros(proxy.shape, dtype)
    of_up: list[Any] = []
    for column, grad in zip(columns, grads, strict=True):
        if column is None:
            of_up.append(None)
            continue
        # All maps of a pixel on one axis: of several XLA makes a copy in another order.
        grad, rows = grad.reshape(*proxy.shape[:3], -1), column.reshape(column.shape[0], -1)
        of_proxy += jnp.einsum("bhwm,sm->bhws", grad, rows, preferred_element_type=dtype)
        of_up.append(jnp.einsum("bhws,bhwm->sm", proxy, grad, preferred_element_type=dtype).reshape(column.shape))
    of_up[0] = of_up[0].reshape(*up.logits.shape, -1).sum(-1)
    return of_proxy, UpProjection(*of_up)
