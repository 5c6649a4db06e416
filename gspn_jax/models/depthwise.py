"""Depthwise convolution in the form that is fastest on each backend."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves each channel with its own odd square kernel, at stride 1 with zero padding.

    On a CPU, XLA's grouped convolution is about 10 times slower than shifted multiply-adds, and its gradient slower
    still, so the CPU sums shifted maps, in float32 (float64 for float64). Other backends call
    `lax.conv_general_dilated`. The custom gradient supports reverse mode only.

    Args:
        x: (B, H, W, C) any float dtype.
        kernel: (n, n, 1, C), n odd, in x's dtype.

    Returns:
        (B, H, W, C) in x's dtype.

    Raises:
        ValueError: a kernel of another shape.
    """
    size = kernel.shape[0]
    if kernel.shape != (size, size, 1, x.shape[-1]) or size % 2 == 0:
        raise ValueError(f"kernel: expected shape (n, n, 1, {x.shape[-1]}) with n odd, got {kernel.shape}")
    return lax.platform_dependent(x, kernel, cpu=_shifted, default=_convolution)


def _forward(x, kernel):
    return depthwise_conv(x, kernel), (x, kernel)


def _backward(residuals, grad):
    def convolution(x, kernel, grad):
        return jax.vjp(_convolution, x, kernel)[1](grad)

    def shifted(x, kernel, grad):
        return _shifted(grad, kernel[::-1, ::-1]), _kernel_gradient(x, grad, kernel.shape[0]).astype(kernel.dtype)

    return lax.platform_dependent(*residuals, grad, cpu=shifted, default=convolution)


depthwise_conv.defvjp(_forward, _backward)


def _convolution(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


def _shifted(x, kernel):
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    dtype = sum_dtype(x)
    # The barriers keep the sum one loop. Fused with what comes before and after it, XLA writes out many of the slices.
    padded, kernel = lax.optimization_barrier((_pad(x.astype(dtype), size), kernel.astype(dtype)))
    total = jnp.zeros_like(x, dtype)
    for i in range(size):
        for j in range(size):
            total += padded[:, i : i + height, j : j + width] * kernel[i, j, 0][None, None, None]
    return lax.optimization_barrier(total).astype(x.dtype)


def _kernel_gradient(x, grad, size):
    """Returns the kernel's gradient, (n, n, 1, C): sums over images of shifted products of x and grad."""
    batch, height, width, channels = x.shape
    dtype = sum_dtype(x)
    padded, grad = _pad(x.astype(dtype), size), grad.astype(dtype)

    # Sums line by line, so that the running total stays in the cache; columns are summed at the end.
    def add_line(total, index):
        image, row = index // height, index % height
        rows = lax.dynamic_slice(padded, (image, row, 0, 0), (1, size, padded.shape[2], channels))[0]
        line = lax.dynamic_slice(grad, (image, row, 0, 0), (1, 1, width, channels))[0]
        return total + jnp.stack([rows[:, j : j + width] * line for j in range(size)], axis=1), None

    zero = jnp.zeros_like(padded, shape=(size, size, width, channels))
    return lax.scan(add_line, zero, jnp.arange(batch * height))[0].sum(axis=2)[:, :, None]


def sum_dtype(x: jax.Array) -> jnp.dtype:
    """Returns the dtype for sums over x: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _pad(x, size):
    return jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
