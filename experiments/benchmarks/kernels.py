"""Device time, bandwidth and memory of the line scan's kernels, beside lax.scan and attention.

    python -m experiments.benchmarks.kernels --output=kernels.csv --budget_s=550
    python -m experiments.benchmarks.kernels --output=kernels.csv --shapes=gspn2,table1_64_b1_c768 --directions=down

Every implementation is first compared with lax.scan, result and gradients, and a wrong one is not timed. Without a GPU,
or with --dry, the same program runs on shrunken maps to show that it works, and writes no device time.

In the CSV, `mosaic` and `xla` (lax.scan) scan in one direction from logits, `..._weights` from float32 weights; a GSPN
layer scans in four. Attention has as many tokens as the map has pixels, and its width in whole heads of 64. GB/s count
the bytes that the operation must move (`scans.ScanCase.bytes_moved`), share is the share of the fastest copy on the
card.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from experiments.benchmarks import device_time, options, scans
from experiments.benchmarks.measurement import FIGURES, Measurement
from experiments.benchmarks.options import Options
from experiments.benchmarks.scans import CANDIDATES, DIRECTIONS, DTYPES, PASSES, make_cases, shrink
from experiments.benchmarks.shapes import GROUPS, select

COMPARED = ("mosaic", "xla", "mosaic_weights", "flash_attention", "softmax_attention", "linear_attention")
COLUMNS = (*scans.COLUMNS, *FIGURES)
DRY_SHAPES = ("gspn2_1024_b16_c8", "table1_64_b1_c768")
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


def sanitize(measurement: Measurement, candidates: Sequence[str], dtypes: Sequence[str]) -> None:
    """Checks shrunken shapes again under each tool of compute-sanitizer, in a process of its own."""
    found = shutil.which("compute-sanitizer")
    # One allocation for each array: a sanitizer sees no fault that stays within an allocator's pool.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    kernels = [name for name in candidates if CANDIDATES[name].scans and not name.startswith("xla")]
    for tool in SANITIZER_TOOLS:
        row = {"candidate": ",".join(kernels), "pass": tool}
        if found is None or not kernels:
            why = "compute-sanitizer is not on the PATH" if found is None else "no kernel among the candidates"
            measurement.write(None, "not run", **row, note=why)
            continue
        command = [
            found, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-m", "experiments.benchmarks.kernels",
            "--tiny", "--correctness_only", f"--candidates={','.join(kernels)}", "--directions=down,right",
            f"--shapes={','.join(DRY_SHAPES)}", f"--dtypes={','.join(dtypes)}",
        ]  # fmt: skip
        seconds = max(1.0, min(200.0, measurement.seconds_left() / 4))
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=seconds,
                cwd=Path(__file__).parents[2],
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            measurement.write(None, "left out", **row, note=f"not done after {seconds:.0f} s")
            continue
        says = [line for line in answer.stdout.splitlines() if line.startswith("========= ")]
        note = f"exit code {answer.returncode}; {says[-1].lstrip('= ') if says else answer.stderr[-200:]}"
        measurement.write(None, "right" if answer.returncode == 0 else "WRONG", **row, note=note)


def run(
    chosen: Options,
    candidates: Sequence[str] = COMPARED,
    *,
    directions: Sequence[str] = DIRECTIONS,
    dtypes: Sequence[str] = DTYPES[:2],
    passes: Sequence[str] = PASSES,
    tiny: bool = False,
    sanitizer: bool = False,
) -> list[dict[str, Any]]:
    """Runs the whole benchmark and returns its rows; the command's flags say what each argument means."""
    chosen = options.dry_without_gpu(chosen)
    if chosen.dry:  # the kernels are interpreted
        candidates = [
            name if "interpret" in name else name.replace("mosaic", "mosaic_interpret") for name in candidates
        ]
    shapes = select(chosen.shapes or (DRY_SHAPES if chosen.dry else tuple(GROUPS)))
    if chosen.dry or tiny:
        shapes = [shrink(shape) for shape in shapes]
    listed = [CANDIDATES[name] for name in dict.fromkeys(candidates)]
    cases = make_cases(shapes, listed, directions=directions, dtypes=dtypes, passes=passes)
    with options.started(chosen, COLUMNS) as measurement:
        measurement.run(
            cases,
            # Checks take half of the time at most, so that something is timed.
            check_part=1.0 if chosen.correctness_only else 0.5,
            after_checks=lambda: sanitize(measurement, candidates, dtypes) if sanitizer else None,
            timed=not chosen.correctness_only,
        )
    return measurement.rows


def define_flags() -> None:
    options.define_flags()
    flags.DEFINE_list("candidates", list(COMPARED), f"Some of {', '.join(CANDIDATES)}.")
    flags.DEFINE_list("dtypes", list(DTYPES[:2]), f"Some of {', '.join(DTYPES)}.")
    flags.DEFINE_list("directions", list(DIRECTIONS), "Directions of the scans.")
    flags.DEFINE_list("passes", list(PASSES), "Some of forward, backward, and both in one program.")
    flags.DEFINE_bool("tiny", False, "Shrunken maps on a GPU.")
    flags.DEFINE_bool("sanitizer", False, "Also checks shrunken maps under compute-sanitizer.")


def main() -> None:
    device_time.prepare_environment()
    rows = run(
        options.from_flags(),
        options.chosen("candidates", tuple(CANDIDATES)),
        directions=options.chosen("directions", DIRECTIONS),
        dtypes=options.chosen("dtypes", DTYPES),
        passes=options.chosen("passes", PASSES),
        tiny=flags.FLAGS.tiny,
        sanitizer=flags.FLAGS.sanitizer,
    )
    options.refuse_faults(rows)


if __name__ == "__main__":
    command_line.start(main, define_flags)
