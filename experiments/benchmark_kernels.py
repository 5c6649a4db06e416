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
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import benchmark_run, device_time, kernel_goals
from experiments.benchmark_run import names
from experiments.kernel_cases import DIRECTIONS, PASSES, make_cases, shrink
from experiments.kernel_contenders import CONTENDERS
from experiments.kernel_gate import TOLERANCES
from experiments.kernel_goals import GOAL_SHAPES
from experiments.kernel_measurement import Benchmark
from experiments.kernel_shapes import GROUPS, select
from experiments.measurement import DeviceLost, Measurement

IMPLEMENTATIONS = ("mosaic", "xla", "mosaic_weights", "flash_attention", "softmax_attention", "linear_attention")
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


def sanitize(benchmark: Measurement, options: argparse.Namespace) -> None:
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


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole benchmark; returns the rows that it wrote."""
    benchmark_run.dry_without_gpu(options)
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
    with benchmark_run.started(Benchmark, options) as (benchmark, file):
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
    return benchmark.rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = benchmark_run.make_parser("experiments.benchmark_kernels", __doc__)
    add = parser.add_argument
    add("--implementations", type=names(list(CONTENDERS)), default=list(IMPLEMENTATIONS))
    add("--dtypes", type=names(list(TOLERANCES)), default=["bfloat16", "float32"])
    add("--directions", type=names(DIRECTIONS), default=list(DIRECTIONS))
    add("--passes", type=names(PASSES), default=list(PASSES))
    add("--tiny", action="store_true", help="shrunken maps")
    add("--sanitizer", action="store_true", help="also checks tiny maps under compute-sanitizer")
    return benchmark_run.parse(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 1 where an implementation gave wrong results or failed."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    device_time.prepare_environment()
    rows = run(options)
    return int(any(row["status"] in ("WRONG", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
