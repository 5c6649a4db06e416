"""Checks of arguments, whose errors name the argument, the expected value and the given value."""

import math
import numbers
from typing import Any


def check_integer(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Raises ValueError unless `value` is an integer from `least` to `most`."""
    if not _is_integer(value):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if not least <= value <= most:
        expected = f"at least {least}" if most == math.inf else f"{least} to {most:,}"
        raise ValueError(f"{name}: expected {expected}, got {value:,}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raises ValueError unless `value` is a number from `least` to `most`; NaN is not."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not least <= float(value) <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value!r}")


def check_bool(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def image_shape(image_size: Any) -> tuple[int, int]:
    """Returns (height, width) of a side or a pair; ValueError unless both are positive integers."""
    size = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(size) != 2 or not all(_is_integer(side) and side > 0 for side in size):
        raise ValueError(f"image_size: expected a positive side or (height, width) in pixels, got {image_size!r}")
    return int(size[0]), int(size[1])


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
