"""Device time, bandwidth and memory of the line scan's kernels, next to lax.scan and attention.

    python -m experiments.benchmark_kernels --out=kernels.csv --budget_s=550
    python -m experiments.benchmark_kernels --out=kernels.csv --shapes=gspn2,table1_64_b1_c768 --directions=down

Needs jax and numpy alone. Every implementation is first held against lax.scan, result and gradients, and what is wrong
is not timed. The shapes that goals name come first, then the direction down. Without a GPU, or with --dry, the same
program runs on shrunken maps to see that it works, and writes no device time.

In the CSV `mosaic` and `xla` (lax.scan) scan in one direction from logits, `..._weights` from float32 weights; a GSPN
layer scans in four. Attention has as many tokens as the map has pixels, and its width in whole heads of 64. GB/s are of
the bytes that the operation must move (`kernel_contenders.bytes_moved`), share is that of the fastest copy here.
"""

import argparse
import datetime
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import device_time, kernel_goals, machine, provenance
from experiments.kernel_cases import DIRECTIONS, PASSES, make_cases, shrink
from experiments.kernel_contenders import CONTENDERS
from experiments.kernel_gate import TOLERANCES
from experiments.kernel_goals import GOAL_SHAPES
from experiments.kernel_measurement import Benchmark, DeviceLost
from experiments.kernel_shapes import GROUPS, select

IMPLEMENTATIONS = ("mosaic", "xla", "mosaic_weights", "flash_attention", "softmax_attention", "linear_attention")
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


def sanitize(benchmark: Benchmark, options: argparse.Namespace) -> None:
    """Checks shrunken shapes again under each tool of compute-sanitizer, in a process of its own."""
    found = shutil.which("compute-sanitizer")
    # One allocation for each array: a sanitizer sees nothing that stays within an allocator's pool.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    scans = [name for name in options.implementations if CONTENDERS[name].scans and not name.startswith("xla")]
    for tool in SANITIZER_TOOLS:
        row = {"implementation": ",".join(scans), "pass": tool}
        if found is None or not scans:
            why = "compute-sanitizer is not on the PATH" if found is None else "no kernel among the implementations"
            benchmark.write(None, "not run", **row, note=why)
            continue
        command = [
            found, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-m", "experiments.benchmark_kernels",
            "--tiny", "--correctness_only", f"--implementations={','.join(scans)}", "--directions=down,right",
            "--shapes=gspn2_1024_b16_c8,table1_64_b1_c768", f"--dtypes={','.join(options.dtypes)}",
        ]  # fmt: skip
        left = benchmark.budget_s - (time.monotonic() - benchmark.start)
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=max(1.0, min(200.0, left / 4)),
                cwd=Path(__file__).parent.parent,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            benchmark.write(None, "left out", **row, note=f"not done after {error.timeout:.0f} s")
            continue
        says = [line for line in answer.stdout.splitlines() if line.startswith("========= ")]
        note = f"exit code {answer.returncode}; {says[-1].lstrip('= ') if says else answer.stderr[-200:]}"
        benchmark.write(None, "right" if answer.returncode == 0 else "WRONG", **row, note=note)


def describe_run(options: argparse.Namespace, clock: str, why_clock: str) -> dict[str, str]:
    drivers = sorted({card.driver for card in machine.find_cards() if card.driver})
    return {
        "hardware": provenance.hardware(),
        "driver": ", ".join(drivers) or "none",
        "jax": jax.__version__,
        "commit": options.commit or provenance.commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": options.command,
        "kind": "DRY: shrunken maps, no device times" if options.dry else "timed",
        "clock": clock + (f" ({why_clock})" if why_clock else ""),
        "seed": str(options.seed),
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole benchmark; returns the rows that it wrote."""
    if jax.default_backend() != "gpu" and not options.dry:
        print("No GPU here: a dry run on shrunken maps, without device times.")
        options.dry = True
    if options.dry:  # the kernels are interpreted
        options.implementations = [name.replace("mosaic", "mosaic_interpret") if "interpret" not in name else name
                                   for name in options.implementations]  # fmt: skip
    shapes = select(options.shapes or (GOAL_SHAPES if options.dry else tuple(GROUPS)))
    if options.dry or options.tiny:
        shapes = [shrink(shape) for shape in shapes]
    contenders = [CONTENDERS[name] for name in dict.fromkeys(options.implementations)]
    cases = make_cases(
        shapes, contenders, directions=options.directions, dtypes=options.dtypes, passes=options.passes,
    )  # fmt: skip
    if options.dry or options.correctness_only:  # a sanitizer and the profiler exclude each other
        clock, why = "host", "nothing is timed"
    else:
        clock, why = device_time.choose_clock()
    with open(options.out or os.devnull, "w", newline="") as file:
        for key, value in describe_run(options, clock, why).items():
            print(f"# {key}: {value}", file=file)
            print(f"{key}: {value}")
        benchmark = Benchmark(
            file, clock=clock, dry=options.dry, runs=options.repeats, seed=options.seed, budget_s=options.budget_s
        )
        try:
            # Half of the time at most goes to checks, so that something is timed: the goals' cases come first in both.
            benchmark.check_all(cases, 1.0 if options.correctness_only else 0.5)
            if options.sanitizer:
                sanitize(benchmark, options)
            if not options.correctness_only:
                benchmark.measure_copy()
                benchmark.time_all(cases)
        except DeviceLost as error:
            benchmark.leave_out(cases, str(error))
        goals = kernel_goals.evaluate([] if options.dry else benchmark.rows)
        for goal in () if options.correctness_only else goals:
            print(f"# goal {goal}", file=file)
            print(goal)
    statuses = [row["status"] for row in benchmark.rows]
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)))
    return benchmark.rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    def names(known: Sequence[str] | None = None):
        def split(text: str) -> list[str]:
            found = [name for name in text.split(",") if name]
            for name in found:
                if known is not None and name not in known:
                    raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; got {name!r}")
            return found

        return split

    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark_kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", help="CSV file to write")
    add("--shapes", type=names(), help="groups or names of experiments/kernel_shapes.py; default all (dry: two)")
    add("--implementations", type=names(list(CONTENDERS)), default=list(IMPLEMENTATIONS))
    add("--dtypes", type=names(list(TOLERANCES)), default=["bfloat16", "float32"])
    add("--directions", type=names(DIRECTIONS), default=list(DIRECTIONS))
    add("--passes", type=names(PASSES), default=list(PASSES))
    add("--repeats", type=int, default=50, help="timed runs of a case, at most")
    add("--budget_s", type=float, default=math.inf, help="seconds after which no case is begun")
    add("--seed", type=int, default=secrets.randbits(31), help="of the inputs; default a new one each time")
    add("--commit", help="written into the CSV; default that of the working tree")
    add("--dry", action="store_true", help="shrunken maps, no device times; by itself where there is no GPU")
    add("--tiny", action="store_true", help="shrunken maps")
    add("--correctness_only", action="store_true", help="no times")
    add("--sanitizer", action="store_true", help="also checks tiny maps under compute-sanitizer")
    options = parser.parse_args(arguments)
    shown = [re.sub("^(--out=).*/", r"\1", argument) for argument in arguments]
    options.command = " ".join(["python -m experiments.benchmark_kernels", *shown])
    if options.out and not Path(options.out).absolute().parent.is_dir():
        parser.error(f"out: expected a file in a folder that exists, got {options.out}")
    try:
        select(options.shapes or [])
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 1 where an implementation gave wrong results or failed."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    device_time.prepare_environment()
    rows = run(options)
    return int(any(row["status"] in ("WRONG", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
