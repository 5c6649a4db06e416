"""The flags that the benchmarks of kernels and mixers share, and the run around their cases."""

import dataclasses
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from absl import flags

from experiments import machine, provenance
from experiments.benchmarks import device_time
from experiments.benchmarks.measurement import Measurement
from experiments.benchmarks.shapes import select

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Options:
    """How a benchmark runs; the flags of the same names say what each means."""

    output: str | None = None
    shapes: Sequence[str] = ()
    repeats: int = 50
    budget_s: float = math.inf
    seed: int = 0
    commit: str | None = None
    dry: bool = False
    correctness_only: bool = False


def define_flags() -> None:
    flags.DEFINE_string("output", None, "CSV file to write.")
    flags.DEFINE_list("shapes", [], "Groups or names in experiments/benchmarks/shapes.py; all by default.")
    flags.DEFINE_integer("repeats", 50, "Timed runs of a case, at most.", lower_bound=1)
    flags.DEFINE_float("budget_s", math.inf, "Seconds after which no case is begun.")
    flags.DEFINE_integer("seed", None, "Seed of the inputs; by default another one each time.")
    flags.DEFINE_string("commit", None, "Commit for the CSV's header, where the working tree does not know it.")
    flags.DEFINE_bool("dry", False, "Shrunken maps and no device times; always so on a machine without a GPU.")
    flags.DEFINE_bool("correctness_only", False, "Checks and times nothing.")


def from_flags() -> Options:
    """Returns the options of the command line.

    Raises:
        ValueError: unknown shapes, or an output in a folder that does not exist.
    """
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Options)}
    values["seed"] = secrets.randbits(31) if values["seed"] is None else values["seed"]
    options = Options(**values)
    select(options.shapes)
    if options.output and not os.path.isdir(os.path.dirname(os.path.abspath(options.output))):
        raise ValueError(f"output: expected a file in a folder that exists, got {options.output}")
    return options


def chosen(flag: str, known: Sequence[str]) -> tuple[str, ...]:
    """Returns the values of a list flag; ValueError if one is not in `known`."""
    values: Any = FLAGS[flag].value
    for value in values:
        if value not in known:
            raise ValueError(f"{flag}: expected some of {', '.join(known)}; got {value!r}")
    return tuple(dict.fromkeys(values))


def dry_without_gpu(options: Options) -> Options:
    """Returns the options, with `dry` on where JAX has no GPU."""
    if jax.default_backend() == "gpu" or options.dry:
        return options
    print("No GPU on this machine: a dry run on shrunken maps, without device times.")
    return dataclasses.replace(options, dry=True)


@contextmanager
def started(options: Options, columns: Sequence[str]) -> Iterator[Measurement]:
    """Opens the output and yields a measurement; prints the number of rows of each status at the end."""
    if options.dry or options.correctness_only:  # a sanitizer and the profiler exclude each other
        clock, why = "host", "nothing is timed"
    else:
        clock, why = device_time.choose_clock()
    drivers = sorted({card.driver for card in machine.find_cards() if card.driver})
    about = provenance.stamp() | {
        "driver": ", ".join(drivers) or "none",
        "kind": "DRY: shrunken maps, no device times" if options.dry else "timed",
        "clock": clock + (f" ({why})" if why else ""),
        "seed": str(options.seed),
    }
    about |= {"commit": options.commit} if options.commit else {}
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    with open(options.output or os.devnull, "w", newline="") as file:
        measurement = Measurement(
            file, columns, about,
            clock=clock, dry=options.dry, runs=options.repeats, seed=options.seed, budget_s=options.budget_s,
        )  # fmt: skip
        yield measurement
    statuses = [row["status"] for row in measurement.rows]
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)))


def refuse_faults(rows: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError if a candidate gave wrong results or failed."""
    faults = [row for row in rows if row["status"] in ("WRONG", "failed")]
    if faults:
        first = " ".join(str(faults[0][key]) for key in ("shape", "candidate", "status", "note") if faults[0][key])
        raise ValueError(f"{len(faults)} of {len(rows)} rows are wrong or failed, the first: {first}")
