"""The goals of the mixers, and from which resolution on GSPN beats flash attention, by rows of `benchmark_mixers`."""

from collections.abc import Mapping, Sequence

from experiments.kernel_goals import Row, goal_line

WIDE, NARROW = "width1152_16", "gspn_t_stage1"
LEVELS = {"sdxl_16k_level1": 10, "sdxl_16k_level2": 60}  # layers of self-attention in SDXL's UNet
GOAL_SHAPES = (WIDE, NARROW, *LEVELS)
# Of the propagations alone, without the mixer's other work: the goals name these.
GOAL_SCOPES = {WIDE: ("mixer", "proxy", "maps"), NARROW: ("mixer", "proxy", "maps")}
CROSSOVER_BATCH = {640: 2, 1152: 32, 1280: 2}  # by width
MOST_SIDE = 32


def milliseconds(rows: Sequence[Row], shape: str, scope: str, pass_: str, implementation: str) -> float | None:
    wanted = {"shape": shape, "scope": scope, "pass": pass_, "implementation": implementation}
    for row in rows:
        if row["median_ms"] and all(row[key] == wanted[key] for key in wanted):
            return float(row["median_ms"])
    return None


def evaluate(rows: Sequence[Row]) -> list[str]:
    """One line for each goal: met, not met or not measured, with the figure that counts for it."""

    def ratio(shape: str, scope: str, pass_: str, slow: str, fast: str) -> list[Row]:
        times = [milliseconds(rows, shape, scope, pass_, name) for name in (slow, fast)]
        return [] if None in times else [{"shape": shape, "ratio": times[0] / times[1]}]  # type: ignore

    faster = [
        (f"{NARROW}, {WIDE}, forward, from maps: fused at least 1.6 times as fast as four scans with separate "
         "normalisation, gate and merge", 1.6,
         [row for shape in (NARROW, WIDE) for row in ratio(shape, "maps", "forward", "separate_normalised", "fused")]),
        (f"{NARROW}, forward, from a proxy: low-rank at least 2.3 times as fast as making the maps and fused", 2.3,
         ratio(NARROW, "proxy", "forward", "fused", "low_rank")),
        (f"{WIDE}, forward, from a proxy: on chip at least 2 times as fast as making the maps and fused", 2.0,
         ratio(WIDE, "proxy", "forward", "fused", "low_rank_on_chip")),
        (f"{WIDE}, mixer, forward and backward: not slower than with flash attention", 1.0,
         ratio(WIDE, "mixer", "both", "flash_attention", "table")),
    ]  # fmt: skip
    lines = [goal_line(goal, found, lambda row: row["ratio"], "{:.2f} times", least=least)
             for goal, least, found in faster]  # fmt: skip

    sides = [{"shape": f"width {width}", "side": crossover(times)} for width, times in by_side(rows).items() if times]
    goal = f"mixer, forward: faster than flash attention from at most {MOST_SIDE} x {MOST_SIDE} tokens on"
    lines.append(goal_line(goal, sides, lambda row: row["side"], "{:.0f} tokens a side", most=MOST_SIDE))

    passes = []
    for name in ("flash_attention", "table"):
        layers = [(count, milliseconds(rows, level, "mixer", "forward", name)) for level, count in LEVELS.items()]
        passes += [sum(count * ms for count, ms in layers if ms)] if all(ms for _, ms in layers) else []
    found = [{"shape": f"{passes[0]:.4g} ms against {passes[1]:.4g} ms", "ratio": passes[0] / passes[1]}
             for _ in passes[1:]]  # fmt: skip
    goal = f"mixers of all {sum(LEVELS.values())} layers of an SDXL UNet at 16K, forward: at least 120 times as fast as"
    return [*lines, goal_line(f"{goal} flash attention's", found, lambda row: row["ratio"], "{:.1f} times", least=120)]


def by_side(rows: Sequence[Row]) -> dict[int, dict[int, tuple[float, float]]]:
    """For each width and each side of a square map: milliseconds of the GSPN mixer and of flash attention's, forward.

    Sides without both are left out.
    """
    found: dict[int, dict[int, tuple[float, float]]] = {}
    for width, batch in CROSSOVER_BATCH.items():
        shapes = {
            int(row["height"]): row["shape"] for row in rows
            if row["shape"] and row["height"] == row["width"] and int(row["channels"]) == width
            and int(row["batch"]) == batch
        }  # fmt: skip
        found[width] = {}
        for side, shape in sorted(shapes.items()):
            gspn, flash = (milliseconds(rows, shape, "mixer", "forward", name) for name in ("table", "flash_attention"))
            if gspn and flash:
                found[width][side] = gspn, flash
    return found


def crossover(times: Mapping[int, tuple[float, float]]) -> float:
    """The smallest side from which on GSPN is faster at every side that was measured; infinite where at none."""
    smallest = float("inf")
    for side in sorted(times, reverse=True):
        gspn, flash = times[side]
        if gspn >= flash:
            break
        smallest = side
    return smallest


def crossover_table(rows: Sequence[Row]) -> str:
    """Markdown: milliseconds of GSPN / flash attention for each width and side, and where GSPN begins to win."""
    table = by_side(rows)
    sides = sorted({side for times in table.values() for side in times})
    heads = ["width", "batch", *(f"{side} x {side}" for side in sides), "GSPN faster from"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for width, times in table.items():
        side = crossover(times)
        begins = "not measured" if not times else "none measured" if side == float("inf") else f"{side} x {side}"
        cells = [f"{times[one][0]:.3g} / {times[one][1]:.3g}" if one in times else "" for one in sides]
        lines.append(f"| {' | '.join([str(width), str(CROSSOVER_BATCH[width]), *cells, begins])} |")
    return "\n".join([*lines, "", "Whole mixers, forward, bfloat16: milliseconds of GSPN / of flash attention."])
