"""The gate of the benchmark: an implementation is timed only where its results are right."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from experiments.kernel_cases import Case
from experiments.kernel_shapes import KernelShape

# RMS(error) / RMS(reference) that passes, by the dtype of x. The same as in tests/tolerances.py, which this file cannot
# import: a test holds the two together.
TOLERANCES = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}

# Values of a map up to which the reference computes the whole of it: 1024 x 1024, batch 16, 8 channels.
MOST_VALUES = 2**27


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one contender at one shape, direction and dtype."""

    passed: bool
    error: float | None  # the largest of the result's and the gradients', RMS(error) / RMS(reference)
    checked: str  # of which part, or why there is no error
    reason: str = ""  # why not passed


def checked_part(shape: KernelShape) -> tuple[int, int]:
    """Images and weight channels that the reference computes: the last ones, at which offsets are largest.

    Batch and channels are independent in a line scan, channels that share a weight excepted: they stay together.
    """
    lines, group = shape.height * shape.width, shape.channels // shape.weight_channels
    images = min(shape.batch, MOST_VALUES // (lines * shape.channels))
    if images:
        return images, shape.weight_channels
    return 1, max(1, min(shape.weight_channels, MOST_VALUES // (lines * group)))


def check(
    case: Case, both: Callable[..., tuple[jax.Array, Sequence[jax.Array]]], inputs: Sequence[jax.Array]
) -> Verdict:
    """Compares result and gradients with lax.scan on the same inputs, and two runs with each other.

    Args:
      case: a line scan.
      both: the program that will be timed: (x, logits or weights, lam, gradient of h) to h and the three gradients.
      inputs: its inputs, at the whole shape.
    """
    shape, tolerance = case.shape, TOLERANCES[case.dtype]
    images, groups = checked_part(shape)
    channels = groups * (shape.channels // shape.weight_channels)
    whole = (images, groups) == (shape.batch, shape.weight_channels)
    part = f"last {images} of {shape.batch} images, last {channels} of {shape.channels} channels"
    checked = "whole" if whole else part

    h, gradients = both(*inputs)
    if differ(both, inputs, (h, gradients)):
        return Verdict(False, None, checked, "two runs on the same inputs differ")
    cut = functools.partial(_last, images=images)
    widths = (channels, channels, groups, channels)  # of h and the gradients of x, weights, lam
    got = [cut(array, width=width) for array, width in zip([h, *gradients], widths, strict=True)]
    del h, gradients
    x, weights, lam, grad_h = (
        cut(array, width=width) for array, width in zip(inputs, (channels, groups, channels, channels), strict=True)
    )
    reference = _reference(case.contender.operation, case.direction, case.chunk)
    names = ("h", "gradient of x", "gradient of weights", "gradient of lam")
    errors: dict[str, jax.Array] = dict(zip(names, reference(x, weights, lam, grad_h, got), strict=True))
    return judge(errors, dict.fromkeys(names, tolerance), checked)


def differ(program: Callable[..., Any], given: Sequence[Any], found: Any) -> bool:
    """Whether another run of the program gives anything else than `found`, not-a-numbers aside."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(program(*given)), strict=True)
    return not all(bool(jnp.array_equal(a, b, equal_nan=True)) for a, b in pairs)


def judge(errors: Mapping[str, jax.Array], tolerances: Mapping[str, float], checked: str) -> Verdict:
    """By the result whose RMS ratio exceeds its tolerance most; both have the results' names as keys."""
    found = {name: float(error) for name, error in errors.items()}
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name] / tolerances[name])
    error, tolerance = found[worst], tolerances[worst]
    if error <= tolerance:  # false for not-a-number
        return Verdict(True, error, checked)
    return Verdict(False, error, checked, f"{worst}: RMS ratio {error:.3g} is above {tolerance:.3g}")


@functools.cache
def _reference(operation: str, direction: str, chunk: int | None) -> Callable[..., list[jax.Array]]:
    """Function to the errors of h and of its three gradients against lax.scan on the same inputs."""

    def scan(x, weights, lam):
        if operation == "from_logits":
            weights = pallas_kernels.row_stochastic(weights, direction=direction)
        return pallas_kernels.line_scan(x, weights, lam, direction=direction, chunk=chunk, implementation="xla")

    def errors(x, weights, lam, grad_h, got):
        # The state is float32 whatever comes in, and the gradients are by definition those of h as it was kept, in x's
        # dtype: from a reference in float32 a right gradient of shared weights is off by 4.5e-3 in bfloat16.
        h, pull = jax.vjp(scan, x, weights, lam)
        return [rms_ratio(one, want) for one, want in zip(got, (h, *pull(grad_h)), strict=True)]

    return jax.jit(errors)


def _last(array: jax.Array, *, images: int, width: int) -> jax.Array:
    return array if array.shape[0] == images and array.shape[-1] == width else array[-images:, ..., -width:]


def rms_ratio(got: jax.Array, want: jax.Array) -> jax.Array:
    """RMS(got - want) / RMS(want) in float32; 0 where both are zero everywhere, as on the weights of a lone line."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    error = jnp.sqrt(jnp.mean((got - want) ** 2))
    return jnp.where(error == 0, 0.0, error / jnp.sqrt(jnp.mean(want**2)))
