"""The first half hour on a card.

    python -m experiments.benchmarks.first_card --part=1 --out=FOLDER

Part 1: facts, and whether the kernels are right. Part 2: the times that decide the design. Part 3: the constants of the
estimate, tiles of layers, compute-sanitizer. Each part ends within 6 minutes and leaves in FOLDER results.jsonl (a line
for each result, as soon as it is there), log.txt, summary.txt and the card's file of measured times.

Compiled programs and the results of all parts stay in --kept, for the parts after. --dry runs tiny maps in the
interpreter on a CPU, to show that the command works; its times mean nothing.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks.first_card import running
from experiments.benchmarks.first_card.plan import DRY_PATIENCE, PARTS, SECONDS_OF_PART, Step, steps
from experiments.benchmarks.first_card.summary import summary


# Not by experiments.command_line: the card's machine may lack absl.
def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--part", default="all", choices=[*map(str, PARTS), "all"])
    found.add_argument("--out", required=True, type=Path, help="folder of the results")
    found.add_argument("--kept", type=Path, default=Path("build/first_card"), help="folder that stays between parts")
    found.add_argument("--commit", default="", help="the measured commit, where there is no git")
    found.add_argument("--seconds", type=float, help=f"time of a part, {SECONDS_OF_PART:.0f}; more in a dry run")
    found.add_argument("--dry", action="store_true", help="tiny maps in the interpreter, on a CPU")
    return found


def main() -> None:
    given = parser().parse_args()
    asked = os.environ.get("JAX_PLATFORMS", "cuda")
    if not given.dry and not asked.startswith(("cuda", "gpu")):
        sys.exit(f"error: JAX_PLATFORMS: expected cuda,cpu or none, got {asked}")
    out, kept = given.out.resolve(), given.kept.resolve()
    for folder in (out, kept):
        folder.mkdir(parents=True, exist_ok=True)
    parts = PARTS if given.part == "all" else [int(given.part)]
    if 1 in parts:  # a new run
        (kept / running.RESULTS).unlink(missing_ok=True)
    seconds = given.seconds or SECONDS_OF_PART * (DRY_PATIENCE if given.dry else 1)
    environment = running.environment(kept, dry=given.dry)

    def command(step: Step) -> list[str]:
        return running.step_command(step.work, out, kept, of=step.of, dry=given.dry, commit=given.commit)

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)  # the steps end, and the summary is printed
    outcomes: list[running.Row] = []
    try:
        for part in parts:
            running.Runner(out, command, environment, seconds, outcomes).run(part, steps(part, given.dry))
    finally:
        text = summary(outcomes, running.read(out / running.RESULTS))
        (out / running.SUMMARY).write_text(text)
        print(text, flush=True)
    if any(row["status"] != "done" for row in outcomes):
        sys.exit("error: not every step is done and right")


if __name__ == "__main__":
    main()
