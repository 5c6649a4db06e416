"""Device time, bandwidth and memory of whole token mixers: GSPN by each path of its kernels, and attention.

    python -m experiments.benchmark_mixers --out=mixers.csv --table=crossover.md --budget_s=1500
    python -m experiments.benchmark_mixers --out=mixers.csv --shapes=sdxl --contenders=table,flash_attention

In bfloat16, at the map of every layer and at those of the crossover with flash attention. A GSPN mixer is first held
against the one that `lax.scan` propagates, result and gradients, and what is wrong is not timed. The shapes that goals
name come first, there also the propagation alone, from a proxy and from maps. Without a GPU, or with --dry, the same
program runs on tiny maps with interpreted kernels to see that it works, and writes no device time.

In the CSV `implementation` is the contender: `table` the path that the mixer takes by itself, `fused` ... the paths
forced, `separate` line scans with other passes by XLA, `xla` GSPN without kernels. GB/s are of the bytes that a mixer
must move (`mixer_contenders.bytes_moved`), share is that of the fastest copy here. compiled_mib: arguments, results and
temporaries of the compiled program.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import benchmark_run, device_time, mixer_goals
from experiments.benchmark_run import names
from experiments.kernel_shapes import CROSSOVER, LAYERS, KernelShape, select
from experiments.measurement import DeviceLost
from experiments.mixer_contenders import CONTENDERS, SCOPES, Contender
from experiments.mixer_measurement import PASSES, Case, MixerBenchmark


def make_cases(
    shapes: Sequence[KernelShape],
    contenders: Sequence[Contender],
    *,
    passes: Sequence[str] = PASSES,
    scopes: Sequence[str] | None = None,
) -> list[Case]:
    """All combinations, in the order in which time is best spent.

    The shapes that goals name come first, then those of the crossover; in each, all of the first two contenders before
    the others.

    Args:
      scopes: at every shape; by default the mixer, and the others where a goal names them.
    """
    cases = [
        Case(one, shape, scope, pass_)
        for shape in shapes
        for scope in scopes or mixer_goals.GOAL_SCOPES.get(shape.name, ("mixer",))
        for pass_ in passes
        for one in contenders
        if one.propagates or scope == "mixer"
    ]

    def order(case: Case) -> tuple[bool, bool, bool]:
        goals, crossover = case.shape.name in mixer_goals.GOAL_SHAPES, case.shape in CROSSOVER
        return not goals, not crossover, case.contender not in contenders[:2]

    return sorted(cases, key=order)


def shrink(shape: KernelShape) -> KernelShape:
    """The same kind of map in a few pixels: interpreting a mixer's kernels takes seconds."""
    size = dict(batch=1, height=min(shape.height, 3), width=min(shape.width, 4), rank=min(shape.rank, 8))
    return dataclasses.replace(shape, **size, channels=8, weight_channels=8)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole benchmark; returns the rows that it wrote."""
    benchmark_run.dry_without_gpu(options)
    chosen = options.shapes or ([mixer_goals.WIDE] if options.dry else [shape.name for shape in (*LAYERS, *CROSSOVER)])
    shapes, contenders = select(chosen), [CONTENDERS[name] for name in dict.fromkeys(options.contenders)]
    if options.dry:
        shapes, contenders = [shrink(shape) for shape in shapes], [one.interpreted for one in contenders]
    cases = make_cases(shapes, contenders, passes=options.passes, scopes=options.scopes)
    with benchmark_run.started(MixerBenchmark, options) as (benchmark, file):
        try:
            if options.correctness_only:
                benchmark.check_all(cases)
            else:
                benchmark.measure_copy()
                benchmark.time_all(cases)
        except DeviceLost as error:
            benchmark.leave_out(cases, str(error))
        rows = [] if options.dry else benchmark.rows
        table = mixer_goals.crossover_table(rows)
        if not options.correctness_only:
            for goal in mixer_goals.evaluate(rows):
                print(f"# goal {goal}", file=file)
                print(goal)
            print(table)
        if options.table:
            Path(options.table).write_text(table + "\n")
    return benchmark.rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = benchmark_run.make_parser("experiments.benchmark_mixers", __doc__)
    add = parser.add_argument
    add("--table", help="Markdown file for the crossover with flash attention; it is printed in any case")
    add("--contenders", type=names(list(CONTENDERS)), default=list(CONTENDERS))
    add("--passes", type=names(PASSES), default=list(PASSES))
    add("--scopes", type=names(SCOPES), help="default the mixer, and where a goal says so the propagation alone")
    options = benchmark_run.parse(parser, arguments)
    without = [shape.name for shape in select(options.shapes or []) if not shape.rank]
    if without:
        parser.error(f"shapes: expected maps of layers, which have a proxy; got {', '.join(without)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 1 where a mixer gave wrong results or failed."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    device_time.prepare_environment()
    rows = run(options)
    return int(any(row["status"] in ("WRONG", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
