"""Checks of the mixers' arguments."""

import numbers

import jax

HEAD_WIDTH = 32


def check_counts(**counts: int) -> None:
    """Raises ValueError, naming the argument, unless each is an integer of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value}")


def check_map(x: jax.Array, features: int) -> None:
    """Raises ValueError unless x has the shape (B, H, W, features)."""
    if x.ndim != 4 or x.shape[-1] != features:
        raise ValueError(f"x: expected shape (B, H, W, {features}), got {x.shape}")


def checked_heads(features: int, num_heads: int | None) -> int:
    """Returns the number of heads; None gives the largest divisor of features that leaves 32 channels to each head.

    Raises:
        ValueError: features is less than 1, or num_heads does not divide it.
    """
    check_counts(features=features)
    if num_heads is None:
        return next(n for n in range(max(features // HEAD_WIDTH, 1), 0, -1) if features % n == 0)
    if num_heads < 1 or features % num_heads:
        raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}")
    return num_heads
