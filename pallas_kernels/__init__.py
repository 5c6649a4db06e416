"""GSPN's operations on (B, H, W, C) maps: the line scan, row-stochastic weights, and four-direction propagation,
of maps in memory or made of a low-rank proxy.

Imports jax and numpy only. Axes: B batch, H rows, W columns, C channels, C_w weight channels (a divisor of C).
Directions are named as the scan walks, in the order of every direction axis: right, down, left, up.
"""

from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.dispatch import implementations, named_layer, record_choices
from pallas_kernels.line_scan import line_scan, line_scan_from_logits
from pallas_kernels.low_rank import propagate_low_rank
from pallas_kernels.propagation import propagate
from pallas_kernels.stability import row_stochastic
from pallas_kernels.up_projection import UpProjection

__all__ = [
    "DIRECTIONS",
    "UpProjection",
    "implementations",
    "line_scan",
    "line_scan_from_logits",
    "propagate",
    "propagate_low_rank",
    "record_choices",
    "row_stochastic",
]
