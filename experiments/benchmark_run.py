"""What the programs that time kernels and mixers share: their flags, and the run around the cases."""

import argparse
import datetime
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import jax

from experiments import device_time, machine, provenance
from experiments.kernel_shapes import select
from experiments.measurement import Measurement


def names(known: Sequence[str] | None = None) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of the known names, separated by commas; any without `known`."""

    def split(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        for name in found:
            if known is not None and name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; got {name!r}")
        return found

    return split


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """With the flags that every such program has."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", help="CSV file to write")
    add("--shapes", type=names(), help="groups or names of experiments/kernel_shapes.py; default all (dry: a few)")
    add("--repeats", type=int, default=50, help="timed runs of a case, at most")
    add("--budget_s", type=float, default=math.inf, help="seconds after which no case is begun")
    add("--seed", type=int, default=secrets.randbits(31), help="of the inputs; default a new one each time")
    add("--commit", help="written into the CSV; default that of the working tree")
    add("--dry", action="store_true", help="shrunken maps, no device times; by itself where there is no GPU")
    add("--correctness_only", action="store_true", help="no times")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options, checked, and with the command that the CSV shall show."""
    options = parser.parse_args(arguments)
    shown = [re.sub("^(--[a-z]+=).*/", r"\1", argument) for argument in arguments]
    options.command = " ".join([parser.prog, *shown])
    if options.out and not Path(options.out).absolute().parent.is_dir():
        parser.error(f"out: expected a file in a folder that exists, got {options.out}")
    try:
        select(options.shapes or [])
    except ValueError as error:
        parser.error(str(error))
    return options


def dry_without_gpu(options: argparse.Namespace) -> None:
    if jax.default_backend() != "gpu" and not options.dry:
        print("No GPU here: a dry run on shrunken maps, without device times.")
        options.dry = True


@contextmanager
def started(kind: type[Measurement], options: argparse.Namespace) -> Iterator[tuple[Measurement, TextIO]]:
    """A measurement and the file that it writes to, in whose header the run is described.

    At the end of the block it prints how many rows there are of each status.
    """
    if options.dry or options.correctness_only:  # a sanitizer and the profiler exclude each other
        clock, why = "host", "nothing is timed"
    else:
        clock, why = device_time.choose_clock()
    with open(options.out or os.devnull, "w", newline="") as file:
        for key, value in describe(options, clock, why).items():
            print(f"# {key}: {value}", file=file)
            print(f"{key}: {value}")
        measurement = kind(
            file, clock=clock, dry=options.dry, runs=options.repeats, seed=options.seed, budget_s=options.budget_s
        )
        yield measurement, file
    statuses = [row["status"] for row in measurement.rows]
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)))


def describe(options: argparse.Namespace, clock: str, why_clock: str) -> dict[str, str]:
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
