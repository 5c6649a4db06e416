"""Draws the curves of runs beside each other, and writes their numbers.

    python -m experiments.figures.training --workdirs=runs/gspn,runs/attention --output=experiments/results/cifar10

Writes OUTPUT.png and OUTPUT.csv: a row for each logged step and each evaluation of each run.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
from absl import flags

from experiments import command_line, tables

HELD_OUT = {  # the title of each number on held-out images; a run shows the first that it has
    "ema_top1": "held-out top-1, percent (moving average of parameters)",
    "top1": "held-out top-1, percent",
    "ema_loss": "held-out loss (moving average of parameters)",
    "loss": "held-out loss",
}


def read(workdir: str) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl in order; ValueError if there is none."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"workdirs: expected folders of runs with a metrics.jsonl, got {workdir}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_csv(runs: dict[str, list[dict[str, Any]]], path: str) -> None:
    columns = ["run", "kind", "step", "loss", "accuracy", "top1", "top5", "ema_top1", "ema_loss"]
    tables.write(path, ({"run": name, **row} for name, rows in runs.items() for row in rows), columns)


def draw(runs: dict[str, list[dict[str, Any]]], path: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles: set[str] = set()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, rows in runs.items():
        train = [row for row in rows if row["kind"] == "train"]
        held_out = [row for row in rows if row["kind"] == "evaluation"]
        (line,) = left.plot([row["step"] for row in train], [row["loss"] for row in train], label=name)
        key = next((key for key in HELD_OUT if held_out and key in held_out[0]), "top1")
        steps, numbers = [row["step"] for row in held_out], [row[key] for row in held_out]
        label = f"{name}: {numbers[-1]:.4g}" if held_out else name
        right.plot(steps, numbers, marker="o", color=line.get_color(), label=label)
        titles.add(HELD_OUT[key])
    for axis, title in ((left, "training loss"), (right, "; ".join(sorted(titles)))):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=9)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def define_flags() -> None:
    flags.DEFINE_list("workdirs", None, "Folders of runs; the last part of each is its name.", required=True)
    flags.DEFINE_string("output", None, "Path of both files, without .png and .csv.", required=True)


def main() -> None:
    runs = {Path(run).name: read(run) for run in flags.FLAGS.workdirs}
    write_csv(runs, f"{flags.FLAGS.output}.csv")
    draw(runs, f"{flags.FLAGS.output}.png")
    print(f"Written to {flags.FLAGS.output}.png and .csv")


if __name__ == "__main__":
    command_line.start(main, define_flags)
