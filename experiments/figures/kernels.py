"""Draws time against resolution from a CSV of `experiments.benchmarks.kernels` or `mixers`, and tabulates them.

    python -m experiments.figures.kernels --csv=experiments/results/kernels.csv --output=experiments/results/kernels

Writes OUTPUT.png and OUTPUT.md, and prints the table. The figure has one line for each candidate over the maps of one
width and batch. A GSPN layer scans in four directions: the lines of scans show four times the mean of the directions
that were timed, as if one ran after the other.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from absl import flags

from experiments import command_line, tables

LABELS = {
    "mosaic": "GSPN, four line scans, Mosaic GPU kernels",
    "mosaic_weights": "the same from float32 weights",
    "gspn": "GSPN mixer, Mosaic GPU kernels",
    "xla": "GSPN, lax.scan",
    "flash_attention": "softmax attention, cuDNN flash",
    "softmax_attention": "softmax attention, XLA",
    "linear_attention": "linear attention, XLA",
}
DIRECTIONS_OF_A_LAYER = 4
_STAMP = ("hardware", "driver", "jax", "commit", "date", "command")

Row = dict[str, str]


def read(path: str) -> tuple[dict[str, str], list[Row]]:
    """Returns the header and the rows of a benchmark's CSV; ValueError for a dry run, which has no times."""
    about, rows = tables.read(path)
    if about.get("kind", "").startswith("DRY"):
        raise ValueError(f"csv: expected a run on a GPU, got the dry run {path}")
    return about, rows


def curves(
    rows: Sequence[Row], *, channels: int, batch_size: int, dtype: str, pass_: str
) -> dict[str, list[tuple[float, float]]]:
    """Returns, for each candidate, (side of a square map of as many pixels, milliseconds), by side.

    Raises:
        ValueError: no timed row has these values.
    """
    wanted = {"channels": str(channels), "batch": str(batch_size), "dtype": dtype, "pass": pass_, "chunk": ""}
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["median_ms"] and row["candidate"] in LABELS and all(row[key] == wanted[key] for key in wanted):
            side = math.sqrt(int(row["height"]) * int(row["width"]))
            times = DIRECTIONS_OF_A_LAYER if row.get("direction") else 1
            found.setdefault((row["candidate"], side), []).append(times * float(row["median_ms"]))
    if not found:
        raise ValueError("csv: expected timed rows of this width, batch size, dtype and pass, got none")
    lines: dict[str, list[tuple[float, float]]] = {}
    for (name, side), times in sorted(found.items(), key=lambda item: item[0][1]):
        lines.setdefault(name, []).append((side, statistics.mean(times)))
    return lines


def draw(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, path: str) -> None:
    """Draws `curves` into a PNG file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in lines.items():
        width = 2.5 if name in ("mosaic", "gspn") else 1.2
        axis.plot(*zip(*points, strict=True), marker="o", label=LABELS[name], linewidth=width)
    sides: list[float] = []
    for side in sorted({side for points in lines.values() for side, _ in points}):
        if not sides or side > 1.2 * sides[-1]:  # labels of near ones would overlap
            sides.append(side)
    names = dict(xlabel="side of a square map of as many tokens", ylabel="milliseconds on the device")
    axis.set(xscale="log", yscale="log", **names)
    axis.set_xticks(sides, [f"{side:.0f}" for side in sides])
    axis.set_xticks([], minor=True)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(about: Mapping[str, str], rows: Sequence[Row], *, direction: str = "down") -> str:
    """Returns Markdown: time, bandwidth and share of the copy bandwidth of every timed candidate, by map and pass."""
    cells = []
    for row in rows:
        if row["median_ms"] and row["shape"] and row.get("direction", "") in (direction, ""):
            size = ", ".join(row[key] for key in ("batch", "height", "width", "channels"))
            figures = (f"{float(row[key]):.3g}" if row[key] else "" for key in ("median_ms", "host_ms", "gb_per_s"))
            share = f"{float(row['share']):.0%}" if row["share"] else ""
            cells.append((row["shape"], size, row["dtype"], row["pass"], row["candidate"], *figures, share))
    heads = ("map", "B, H, W, C", "dtype", "pass", "candidate", "ms", "ms by the host", "GB/s", "of a copy")
    where = "; ".join(f"{key} {about[key]}" for key in _STAMP if key in about)
    note = f"Medians of device time; scans walk one direction, `{direction}`. {where}."
    return f"{tables.markdown(heads, cells)}\n\n{note}\n"


def define_flags() -> None:
    flags.DEFINE_string("csv", None, "CSV of experiments.benchmarks.kernels or mixers.", required=True)
    flags.DEFINE_string("output", None, "Path of both files, without .png and .md; by default only prints the table.")
    flags.DEFINE_integer("channels", 640, "Width of the maps drawn; the default is SDXL's finer level.")
    flags.DEFINE_integer("batch_size", 2, "Batch size of the maps drawn.")
    flags.DEFINE_string("dtype", "bfloat16", "Dtype of the maps drawn.")
    flags.DEFINE_enum("pass", "forward", ["forward", "backward", "both"], "The pass drawn.")


def main() -> None:
    chosen: Any = flags.FLAGS
    about, rows = read(chosen.csv)
    text = table(about, rows)
    if chosen.output:
        pass_ = chosen["pass"].value
        kind = dict(channels=chosen.channels, batch_size=chosen.batch_size, dtype=chosen.dtype)
        title = f"{pass_}, batch {chosen.batch_size}, {chosen.channels} channels, {chosen.dtype}"
        draw(curves(rows, **kind, pass_=pass_), f"{title}; {about.get('hardware', '')}", f"{chosen.output}.png")
        Path(f"{chosen.output}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    command_line.start(main, define_flags)
