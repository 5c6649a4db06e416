"""Checks of a network's sizes."""

import math
from typing import Any

import numpy as np


def check_counts(**counts: Any) -> None:
    """Raises ValueError, naming the argument, unless each is None, an integer >= 1 or a sequence of such integers."""
    for name, value in counts.items():
        is_sequence = isinstance(value, list | tuple)
        for count in value if is_sequence else (value,):
            is_integer = isinstance(count, int | np.integer) and not isinstance(count, bool)
            if value is not None and not (is_integer and count >= 1):
                expected = "integers" if is_sequence else "an integer"
                raise ValueError(f"{name}: expected {expected} of at least 1, got {value}")


def check_positive(**values: float) -> None:
    """Raises ValueError, naming the argument, unless each is a finite number above 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a number above 0, got {value}")
