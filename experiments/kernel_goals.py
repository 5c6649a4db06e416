"""The goals of the kernels, held against the rows of `experiments.benchmark_kernels`."""

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

BIG, SMALL = "gspn2_1024_b16_c8", "table1_64_b1_c768"
GOAL_SHAPES = (BIG, SMALL)


def evaluate(rows: Sequence[Row]) -> list[str]:
    """One line for each goal: met, not met or not measured, with the worst figure that counts for it."""
    timed = [row for row in rows if row["median_ms"]]
    scans = [row for row in timed if row["implementation"] == "mosaic"]
    large = [
        row for row in scans if row["dtype"] == "bfloat16" and row["channels"] >= 32 and row["bytes"] >= 64e6
    ]  # fmt: skip

    def at(shape: str, dtype: str) -> list[Row]:
        wanted = [row for row in scans if row["shape"] == shape and row["dtype"] == dtype and row["pass"] == "forward"]
        return [row for row in wanted if row["direction"] == "down" or shape != BIG]

    lines = []
    for pass_, least in (("forward", 0.90), ("backward", 0.85)):
        goal = f"{pass_}, bfloat16, from logits, C >= 32, 64 MB or more: at least {least:.0%} of the copy bandwidth"
        having = [row for row in large if row["pass"] == pass_ and row["share"]]
        lines.append(goal_line(goal, having, lambda row: row["share"], "{:.1%}", least=least))
    for shape, dtype, most, unit in (
        (BIG, "bfloat16", 0.45, "down"),
        (BIG, "float32", 0.85, "down"),
        (SMALL, "bfloat16", 0.060, "each direction"),
    ):
        goal = f"{shape}, forward, {dtype}, {unit}: at most {most:.3g} ms"
        lines.append(goal_line(goal, at(shape, dtype), lambda row: row["median_ms"], "{:.4f} ms", most=most))
    for shape in GOAL_SHAPES:
        pairs = [
            {**row, "speedup": other} for row in at(shape, "bfloat16") + at(shape, "float32")
            if (other := speedup(row, timed)) is not None
        ]  # fmt: skip
        goal = f"{shape}, forward: at least 20 times as fast as lax.scan"
        lines.append(goal_line(goal, pairs, lambda row: row["speedup"], "{:.1f} times", least=20))
    return lines


def speedup(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times faster than lax.scan in the same case; the better of lax.scan's two times counts."""
    same = ("shape", "direction", "chunk", "dtype", "pass")
    for other in rows:
        if other["implementation"] == "xla" and all(other[key] == row[key] for key in same) and other["median_ms"]:
            return min(other["median_ms"], other["host_ms"]) / row["median_ms"]
    return None


def goal_line(
    goal: str,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    form: str,
    *,
    least: float | None = None,
    most: float | None = None,
) -> str:
    """Met, not met or not measured, by the worst of the rows: the smallest value where `least` is given."""
    if not rows:
        return f"not measured: {goal}"
    worst = min(rows, key=value) if least is not None else max(rows, key=value)
    met = (least is None or value(worst) >= least) and (most is None or value(worst) <= most)
    where = " ".join(str(worst[key]) for key in ("shape", "direction", "dtype") if worst.get(key))
    return f"{'met' if met else 'NOT met'}: {goal}: worst of {len(rows)} {form.format(value(worst))} ({where})"
