"""Draws time against resolution from a CSV of `experiments.benchmark_kernels`, and writes its table in Markdown.

    python -m experiments.plot_kernels --csv=experiments/results/kernels.csv --out=docs/speed.png --table=speed.md

The figure has one line for each implementation over the maps of one width and batch. A GSPN layer scans in four
directions: the lines of scans show four times the mean of the directions that were timed.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

Row = dict[str, str]

LABELS = {
    "mosaic": "GSPN, four line scans, Mosaic GPU kernels",
    "mosaic_weights": "the same from float32 weights",
    "xla": "GSPN, four line scans, lax.scan",
    "flash_attention": "softmax attention, cuDNN flash",
    "softmax_attention": "softmax attention, XLA",
    "linear_attention": "linear attention, XLA",
}
DIRECTIONS_OF_A_LAYER = 4


def read(path: str) -> tuple[dict[str, str], list[Row]]:
    """The header of a CSV (hardware, commit, date, ...) and its rows.

    Raises:
        ValueError: it is of a dry run, which has no times.
    """
    lines = Path(path).read_text().splitlines()
    comments = [line.removeprefix("# ").partition(": ") for line in lines if line.startswith("# ")]
    about = {key: value for key, _, value in comments if not key.startswith("goal ")}
    if about.get("kind", "").startswith("DRY"):
        raise ValueError(f"csv: expected a run on a GPU, got the dry run {path}")
    return about, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def curves(
    rows: Sequence[Row], *, channels: int, batch: int, dtype: str, pass_: str
) -> dict[str, list[tuple[float, float]]]:
    """Of each implementation, (side of a square map of as many pixels, milliseconds), by side."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        wanted = {"channels": str(channels), "batch": str(batch), "dtype": dtype, "pass": pass_, "chunk": ""}
        if row["median_ms"] and row["implementation"] in LABELS and all(row[key] == wanted[key] for key in wanted):
            side = math.sqrt(int(row["height"]) * int(row["width"]))
            times = DIRECTIONS_OF_A_LAYER if row["direction"] else 1
            found.setdefault((row["implementation"], side), []).append(times * float(row["median_ms"]))
    lines: dict[str, list[tuple[float, float]]] = {}
    for (name, side), times in sorted(found.items(), key=lambda item: item[0][1]):
        lines.setdefault(name, []).append((side, statistics.mean(times)))
    return {name: lines[name] for name in LABELS if name in lines}


def draw(lines: dict[str, list[tuple[float, float]]], title: str, path: str) -> None:
    """Raises ValueError where there is nothing to draw."""
    if not lines:
        raise ValueError("csv: expected timed rows of this width, batch, dtype and pass; there are none")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in lines.items():
        axis.plot(
            *zip(*points, strict=True), marker="o", label=LABELS[name], linewidth=2.5 if name == "mosaic" else 1.2
        )
    sides: list[float] = []
    for side in sorted({side for points in lines.values() for side, _ in points}):
        if not sides or side > 1.2 * sides[-1]:  # labels of near ones would overlap
            sides.append(side)
    axis.set(
        xscale="log", yscale="log", xlabel="side of a square map of as many tokens", ylabel="milliseconds on the device"
    )
    axis.set_xticks(sides, [f"{side:.0f}" for side in sides])
    axis.set_xticks([], minor=True)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(about: dict[str, str], rows: Sequence[Row], *, direction: str = "down") -> str:
    """Markdown: for each map, dtype and pass the kernels' time and bandwidth in one direction, next to the others."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["median_ms"] and row["shape"] and row["direction"] in (direction, ""):
            key = tuple(row[name] for name in ("shape", "dtype", "pass"))
            cases.setdefault(key, {})[row["implementation"]] = row
    lines = [
        "| map (B, H, W, C) | dtype | pass | kernel, ms | GB/s | of copy | lax.scan, ms | faster | flash, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (_, dtype, pass_), found in cases.items():
        kernel, scan, flash = (found.get(name) for name in ("mosaic", "xla", "flash_attention"))
        shape = next(iter(found.values()))
        size = ", ".join(shape[key] for key in ("batch", "height", "width", "channels"))
        size += "" if shape["weight_channels"] == shape["channels"] else f" (C_w {shape['weight_channels']})"
        faster = f"{_better(scan) / float(kernel['median_ms']):.1f} x" if kernel and scan else ""
        cells = [size, dtype, pass_, _figure(kernel, "median_ms"), _figure(kernel, "gb_per_s")]
        cells += [f"{float(kernel['share']):.0%}" if kernel and kernel["share"] else ""]
        cells += [_figure(scan, "median_ms"), faster, _figure(flash, "median_ms")]
        lines.append(f"| {' | '.join(cells)} |")
    keys = ("hardware", "driver", "jax", "commit", "date", "command")
    where = "; ".join(f"{key} {about[key]}" for key in keys if key in about)
    return "\n".join(
        [
            *lines,
            "",
            f"One direction, `{direction}`; medians of device time; flash: softmax attention by cuDNN. {where}.",
            "",
        ]
    )


def _better(scan: Row) -> float:
    """The better of lax.scan's two times: a trace may slow its many small kernels down."""
    return min(float(scan["median_ms"]), float(scan["host_ms"]))


def _figure(row: Row | None, key: str) -> str:
    return f"{float(row[key]):.3g}" if row and row[key] else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.plot_kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add: Any = parser.add_argument
    add("--csv", required=True, help="of experiments.benchmark_kernels")
    add("--out", help="PNG file to draw")
    add("--table", help="Markdown file to write; it is printed in any case")
    add("--channels", type=int, default=640, help="of the maps drawn; default SDXL's finer level of self-attention")
    add("--batch", type=int, default=2)
    add("--dtype", default="bfloat16")
    add("--pass", dest="pass_", choices=("forward", "backward", "both"), default="forward")
    options = parser.parse_args(arguments)
    try:
        about, rows = read(options.csv)
        if options.out:
            chosen = {key: getattr(options, key) for key in ("channels", "batch", "dtype", "pass_")}
            title = f"{options.pass_}, batch {options.batch}, {options.channels} channels, {options.dtype}"
            draw(curves(rows, **chosen), f"{title}; {about.get('hardware', '')}", options.out)
        text = table(about, rows)
        if options.table:
            Path(options.table).write_text(text)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
