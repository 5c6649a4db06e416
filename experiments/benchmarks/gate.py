"""Decides whether an implementation is right: only then is it timed."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison with the reference."""

    passed: bool
    error: float | None  # RMS(error) / RMS(reference) of the result or gradient that exceeds its tolerance most
    checked: str  # the part of the map that was compared, or why there is no error
    reason: str = ""  # why it did not pass


def rms_ratio(got: jax.Array, want: jax.Array) -> jax.Array:
    """Returns RMS(got - want) / RMS(want) in float32; 0 where both are zero everywhere."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    error = jnp.sqrt(jnp.mean((got - want) ** 2))
    return jnp.where(error == 0, 0.0, error / jnp.sqrt(jnp.mean(want**2)))


def differ(program: Callable[..., Any], given: Sequence[Any], found: Any) -> bool:
    """Says whether another run of the program returns other values than `found`; NaN equals NaN."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(program(*given)), strict=True)
    return not all(bool(jnp.array_equal(a, b, equal_nan=True)) for a, b in pairs)


def judge(errors: Mapping[str, jax.Array], tolerances: Mapping[str, float], checked: str) -> Verdict:
    """Judges by the result whose RMS ratio exceeds its tolerance most.

    Args:
        errors: RMS ratio of each result by its name.
        tolerances: the largest RMS ratio that passes, by the same names.
        checked: goes into the verdict.
    """
    found = {name: float(error) for name, error in errors.items()}
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name] / tolerances[name])
    error, tolerance = found[worst], tolerances[worst]
    if error <= tolerance:  # false for NaN
        return Verdict(True, error, checked)
    return Verdict(False, error, checked, f"{worst}: RMS ratio {error:.3g} is above {tolerance:.3g}")


def part_name(images: int, of_images: int, channels: int, of_channels: int) -> str:
    """Names the part of a map that the reference computes."""
    if (images, channels) == (of_images, of_channels):
        return "whole"
    return f"last {images} of {of_images} images, last {channels} of {of_channels} channels"


def last_part(array: jax.Array, images: int, channels: int) -> jax.Array:
    """Returns the last images and channels of an array (B, ..., C): offsets are largest there."""
    same = array.shape[0] == images and array.shape[-1] == channels
    return array if same else array[-images:, ..., -channels:]
