"""The equations as loops over pixels in float64, with which the operations are compared."""

import numpy as np

from pallas_kernels import DIRECTIONS


def line_scan(x, weights, lam, direction, chunk=None):
    batch, height, width, channels = x.shape
    spread = np.repeat(weights, channels // weights.shape[-1], axis=-1).astype(np.float64)
    h = np.zeros(x.shape)
    vertical, back = direction in ("down", "up"), direction in ("left", "up")
    length, pixels = (height, width) if vertical else (width, height)
    for step in range(length):
        line = length - 1 - step if back else step
        before = line + 1 if back else line - 1
        starts = step == 0 or (chunk is not None and step % chunk == 0)
        for pixel in range(pixels):
            here = (slice(None), line, pixel) if vertical else (slice(None), pixel, line)
            value = lam[here].astype(np.float64) * x[here].astype(np.float64)
            for slot, neighbour in enumerate((pixel - 1, pixel, pixel + 1)):
                if not starts and 0 <= neighbour < pixels:
                    there = (slice(None), before, neighbour) if vertical else (slice(None), neighbour, before)
                    value = value + spread[here][:, slot] * h[there]
            h[here] = value
    return h


def row_stochastic(logits, direction):
    share = 1 / (1 + np.exp(-np.maximum(logits.astype(np.float64), -27.0)))
    if direction in ("down", "up"):
        share[:, :, 0, 0], share[:, :, -1, 2] = 0, 0
    else:
        share[:, 0, :, 0], share[:, -1, :, 2] = 0, 0
    return share / share.sum(axis=3, keepdims=True)


def propagate(x, logits, lam, gate, skip, merge, chunk=None):
    y = np.zeros(x.shape)
    for d, direction in enumerate(DIRECTIONS):
        weights = row_stochastic(logits[:, :, :, d], direction)
        part = gate[:, :, :, d] * line_scan(x, weights, lam[:, :, :, d], direction, chunk)
        y += merge[d] * (part if skip is None else part + skip[:, :, :, d] * x)
    return y


def propagate_unturned(x, logits, lam, gate, skip, merge, chunk=None):
    """Every pass is a scan to the right over a turned image, with the maps as they are and no turning back."""
    y = np.zeros(x.shape)
    transposed = x.transpose(0, 2, 1, 3)
    for d, turned in enumerate((x, transposed, x[:, :, ::-1], transposed[:, :, ::-1])):
        weights = row_stochastic(logits[:, :, :, d], "right")
        part = gate[:, :, :, d] * line_scan(turned, weights, lam[:, :, :, d], "right", chunk)
        y += merge[d] * (part + skip[:, :, :, d] * turned)
    return y
