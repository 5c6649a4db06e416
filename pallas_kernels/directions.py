"""The four directions of a scan."""

DIRECTIONS = ("right", "down", "left", "up")


def walked_axis(direction: str) -> int:
    """The axis of a (B, H, W, ...) map along which the scan goes from line to line."""
    return 1 if direction in ("down", "up") else 2


def neighbour_axis(direction: str) -> int:
    """The axis of a (B, H, W, ...) map along which the three neighbours lie."""
    return 2 if direction in ("down", "up") else 1


def walks_back(direction: str) -> bool:
    """Whether the scan starts at the line of largest index."""
    return direction in ("left", "up")
