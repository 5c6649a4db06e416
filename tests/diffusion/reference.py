"""Multistep samplers in NumPy, a call after the other, from the formulas of their papers."""

from collections.abc import Callable
from typing import Any

import numpy as np

Predict = Callable[[np.ndarray, float], np.ndarray]  # (x, timestep) -> noise


def moved(x: np.ndarray, e: np.ndarray, before: Any, after: Any) -> np.ndarray:
    """PNDM, equation 9: x at abar `after` from x at abar `before`, if the noise is e."""
    scale = before * np.sqrt(1 - after) + np.sqrt(before * (1 - before) * after)
    return np.sqrt(after / before) * x - (after - before) * e / scale


def pndm(
    predict: Predict, x: np.ndarray, timesteps: Any, alphas_bar: np.ndarray, gap: int, *, repeated: bool
) -> np.ndarray:
    """The abar of timesteps below 0 is that of 0. `repeated`: diffusers takes the second call for the repeated one."""
    kept, first = [], x
    for number, t in enumerate(timesteps):
        e = predict(x, t)
        if repeated and number == 1:
            x = moved(first, (e + kept[0]) / 2, alphas_bar[t + gap], alphas_bar[t])
            continue
        kept.append(e)
        if len(kept) == 2:
            e = (3 * kept[-1] - kept[-2]) / 2
        elif len(kept) == 3:
            e = (23 * kept[-1] - 16 * kept[-2] + 5 * kept[-3]) / 12
        elif len(kept) > 3:
            e = (55 * kept[-1] - 59 * kept[-2] + 37 * kept[-3] - 9 * kept[-4]) / 24
        x = moved(x, e, alphas_bar[t], alphas_bar[max(t - gap, 0)])
    return x


def deis(predict: Predict, x: np.ndarray, timesteps: Any, sigmas: np.ndarray, *, first_order_end: bool) -> np.ndarray:
    """The weights are integrals of Lagrange polynomials in log sigma, by Gauss's rule."""
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    found = []
    y = x * np.sqrt(sigmas[0] ** 2 + 1)  # x / sqrt(abar)
    for n, t in enumerate(timesteps):
        now, after = sigmas[n], sigmas[n + 1]
        found.append(predict(y / np.sqrt(now**2 + 1), t))
        at = now + (after - now) * (nodes + 1) / 2
        if n == 0 or (first_order_end and n == len(timesteps) - 1):
            y = y + (after - now) * found[-1]
            continue
        share = np.log(at / sigmas[n - 1]) / np.log(now / sigmas[n - 1])
        for polynomial, noise in ((share, found[-1]), (1 - share, found[-2])):
            y = y + (after - now) / 2 * np.sum(node_weights * polynomial) * noise
    return y / np.sqrt(sigmas[-1] ** 2 + 1)


def dpm_solver(
    predict: Predict, x: np.ndarray, timesteps: Any, sigmas: np.ndarray, *, first_order_end: bool
) -> np.ndarray:
    """DPM-Solver++, algorithm 2, with lambda = -log sigma."""
    x_starts = []
    for n, t in enumerate(timesteps):
        now, after = sigmas[n], sigmas[n + 1]
        x_starts.append(np.sqrt(now**2 + 1) * x - now * predict(x, t))
        d = x_starts[-1]
        if n > 0 and not (first_order_end and n == len(timesteps) - 1):
            half = np.log(now / after) / np.log(sigmas[n - 1] / now) / 2  # 1 / (2 r)
            d = (1 + half) * x_starts[-1] - half * x_starts[-2]
        signal = 1 / np.sqrt(after**2 + 1)
        x = signal * (after / now * np.sqrt(now**2 + 1) * x + (1 - after / now) * d)
    return x
