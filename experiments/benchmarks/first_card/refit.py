"""Fits the constants of the kernels' estimate to the times of this card."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.first_card import running
from experiments.benchmarks.first_card.context import Context
from pallas_kernels.mosaic import card, estimate, measured
from pallas_kernels.mosaic.card import Card
from pallas_kernels.mosaic.tiles import Problem, Tile

# A constant that is twice its default costs as much as a tenth of a time that is wrong by a factor of two: constants
# that no time depends on stay.
WEIGHT_OF_DEFAULTS = 0.1
FACTORS = (2.0, 0.5, 1.2, 1 / 1.2, 1.05, 1 / 1.05)
MOST_ROUNDS = 40
KERNELS = ("scan", "low_rank")  # parts of the names of our kernels in a profile

Launches = Sequence[tuple[Problem, Tile]]


def refit(context: Context) -> None:
    """Fits the rates to the times of the parts before, and keeps them; writes the errors before and after.

    Raises:
        RuntimeError: there are no times.
    """
    rows = [row for row in running.read(context.kept / running.RESULTS) if row.get("status") == "timed"]
    times = [(launches_of(row), kernel_milliseconds(row)) for row in rows if row.get("launches")]
    if not times:
        raise RuntimeError(f"no times of kernels in {context.kept}: run parts 1 and 2 before, or carry their results")
    search, present = context.search(), card.planned_for()
    before = dataclasses.asdict(estimate.rates(present))
    after = fit(times, present)
    search.keep(rates=after)
    errors = {name: typical_factor(times, rates, present) for name, rates in (("before", before), ("after", after))}
    context.write({"kind": "rates", "times": len(times), "typical_factor": errors, "rates": after, "defaults": before})


def launches_of(row: dict[str, Any]) -> Launches:
    """Returns the launches that a row of results lists."""

    def tuples(fields: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}

    return [(Problem(**tuples(one["problem"])), Tile(**one["tile"])) for one in row["launches"]]


def kernel_milliseconds(row: dict[str, Any]) -> float:
    """Returns the time of our kernels in a row, without XLA's; the whole where no profile tells them apart."""
    parts = {name: ms for name, ms in row.get("parts", {}).items() if any(word in name for word in KERNELS)}
    return sum(parts.values()) or row["milliseconds"]


def predicted(launches: Launches, rates: dict[str, float], present: Card) -> float:
    """Returns the estimate's milliseconds with these rates."""
    with measured.assume_rates(rates):
        return 1e3 * sum(estimate.seconds(problem, tile, present) for problem, tile in launches)


def typical_factor(times: Sequence[tuple[Launches, float]], rates: dict[str, float], present: Card) -> float:
    """Returns the factor by which the estimate is typically off: exp of the RMS of the logarithms of its errors."""
    logs = [math.log(predicted(launches, rates, present) / ms) for launches, ms in times]
    return float(np.exp(np.sqrt(np.mean(np.square(logs)))))


def fit(times: Sequence[tuple[Launches, float]], present: Card) -> dict[str, float]:
    """Returns the rates that predict the times best: one constant after the other is raised and lowered.

    Args:
        times: launches and their milliseconds.
        present: the card that they ran on.
    """
    start = dataclasses.asdict(estimate.rates(present))

    def loss(rates: dict[str, float]) -> float:
        moved = [math.log(rates[name] / start[name]) for name in start]
        return math.log(typical_factor(times, rates, present)) ** 2 + WEIGHT_OF_DEFAULTS * float(
            np.mean(np.square(moved))
        )

    best, least = dict(start), loss(start)
    for _ in range(MOST_ROUNDS):
        before = least
        for name in start:
            for factor in FACTORS:
                trial = best | {name: best[name] * factor}
                if (found := loss(trial)) < least:
                    best, least = trial, found
        if before - least < 1e-6:
            break
    return {name: float(f"{value:.4g}") for name, value in best.items()}
