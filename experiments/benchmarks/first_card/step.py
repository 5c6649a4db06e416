"""The process of one step: `python -m experiments.benchmarks.first_card.step --work=family --out=FOLDER --kept=FOLDER`.

Its results are lines of JSON in the folder; what it prints goes into the log.
"""

import argparse
import importlib
from pathlib import Path

from experiments.benchmarks import device_time

# Work: module and function, which takes a context and, unless the step has no argument, what the step is about.
WORK = {
    "facts": "facts.facts",
    "copies": "facts.copies",
    "family": "correctness.check",
    "small": "correctness.check_all_small",
    "tests": "correctness.run_tests",
    "sanitizer": "correctness.sanitize",
    "variants": "times.variants",
    "scans": "times.scans",
    "attention": "times.attention_beside",
    "lines": "times.lines",
    "tiles": "times.tiles",
    "compile": "train.compile_step",
    "train": "train.time_step",
    "refit": "refit.refit",
}
# They start a process that needs the card's memory, and leave the card alone themselves.
WITHOUT_CARD = ("tests", "sanitizer")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--work", required=True, choices=list(WORK))
    found.add_argument("--of", default="")
    found.add_argument("--out", required=True, type=Path)
    found.add_argument("--kept", required=True, type=Path)
    found.add_argument("--commit", default="")
    found.add_argument("--dry", action="store_true")
    return found


def main() -> None:
    given = parser().parse_args()
    device_time.prepare_environment()
    from experiments.benchmarks.first_card.context import Context  # late: it imports JAX, which reads the environment

    context = Context(f"{given.work} {given.of}".strip(), given.out, given.kept, given.dry, given.commit)
    if given.work not in WITHOUT_CARD:
        context.require_card()
    module, name = WORK[given.work].split(".")
    work = getattr(importlib.import_module(f"experiments.benchmarks.first_card.{module}"), name)
    work(context, *([given.of] if given.of else []))


if __name__ == "__main__":
    main()
