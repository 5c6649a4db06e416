"""GSPN's operations on (B, H, W, C) maps: the line scan, row-stochastic weights, and propagation in four directions.

Imports jax and numpy only. Axes: B batch, H rows, W columns, C channels, C_w weight channels (C_w divides C). A
direction is named after the way the scan walks; every axis of directions has the order right, down, left, up.
"""

from pallas_kernels.choices import VARIANTS, named_layer, record_choices
from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.dispatch import implementations
from pallas_kernels.line_scan import line_scan, line_scan_from_logits
from pallas_kernels.propagation import propagate, propagate_low_rank
from pallas_kernels.stability import row_stochastic
from pallas_kernels.up_projection import UpProjection

__all__ = [
    "DIRECTIONS",
    "VARIANTS",
    "UpProjection",
    "implementations",
    "line_scan",
    "line_scan_from_logits",
    "named_layer",
    "propagate",
    "propagate_low_rank",
    "record_choices",
    "row_stochastic",
]
