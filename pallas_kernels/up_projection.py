"""The maps of a propagation as linear functions of a low-rank proxy (GSPN, section 3; figure 2)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import state_dtype


class UpProjection(NamedTuple):
    """Matrices from a proxy of S channels to the maps of the four directions, in the order of `DIRECTIONS`.

    Attributes:
        logits: (S, 4, 3, C_w), where C_w divides C.
        lam: (S, 4, C).
        gate: (S, 4, C).
        skip: (S, 4, C), or None for a propagation without skip.
    """

    logits: jax.Array
    lam: jax.Array
    gate: jax.Array
    skip: jax.Array | None


def maps_of(proxy: jax.Array, up: UpProjection) -> tuple[jax.Array, Any, Any, Any]:
    """proxy (B, H, W, S) times `up`: logits (B, H, W, 4, 3, C_w), and lam, gate, skip (B, H, W, 4, C).

    The maps have the proxy's dtype; skip is None where `up.skip` is.
    """
    lam, gate, skip = (None if array is None else jnp.einsum("bhws,sdc->bhwdc", proxy, array) for array in up[1:])
    return jnp.einsum("bhws,sdkc->bhwdkc", proxy, up.logits), lam, gate, skip


def gradients_of_maps(proxy: jax.Array, up: UpProjection, grads: tuple) -> tuple[jax.Array, UpProjection]:
    """Gradients of proxy and up, float32 (float64 for a float64 proxy), from the gradients of `maps_of`.

    Args:
        proxy: (B, H, W, S).
        up: the matrices.
        grads: of logits, lam, gate and skip (None where `up.skip` is). The gradient of logits may have C channels
            instead of C_w, one for each channel that shares a weight.
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
        # (B, H, W, ...) to (B, H, W, M): XLA would copy an array of several map axes into another order.
        grad, rows = grad.reshape(*proxy.shape[:3], -1), column.reshape(column.shape[0], -1)
        of_proxy += jnp.einsum("bhwm,sm->bhws", grad, rows, preferred_element_type=dtype)
        of_up.append(jnp.einsum("bhws,bhwm->sm", proxy, grad, preferred_element_type=dtype).reshape(column.shape))
    of_up[0] = of_up[0].reshape(*up.logits.shape, -1).sum(-1)
    return of_proxy, UpProjection(*of_up)
