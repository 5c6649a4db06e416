"""Times the variants of propagations and the tiles of all kernels on this card, and keeps the fastest.

    python -m experiments.benchmarks.tune --shapes=gspn_t,sdxl

Needs a card that the kernels run on. Layers, which have a proxy, propagate: their variants are timed, then the tiles of
the kernels that a train step runs. Other maps are scanned in --directions. Each result is compared with `lax.scan`, and
a wrong one is refused. Each time is written at once into the card's file in pallas_kernels/mosaic/measured, from which
plans and choices are made. --dry interprets tiny maps and needs --folder: it shows that the program works.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line, provenance
from experiments.benchmarks import device_time
from experiments.benchmarks.options import chosen
from experiments.benchmarks.passes import MODES, Pass
from experiments.benchmarks.scans import DIRECTIONS, DTYPES
from experiments.benchmarks.search import Search, time_tiles, time_variants
from experiments.benchmarks.shapes import GROUPS, KernelShape, select
from pallas_kernels.choices import VARIANTS
from pallas_kernels.mosaic import card, measured

WHAT = ("variants", "tiles")


def tune(shape: KernelShape, search: Search, options: Any) -> list[dict[str, Any]]:
    """Times a map, and returns the rows; `options` has the command's flags."""
    rows = []
    if shape.rank and "variants" in options.what:
        rows += time_variants(shape, search, modes=options.modes)
    if "tiles" not in options.what:
        return rows
    passes = [Pass(shape, mode, implementation=search.implementation, dtype=options.dtype) for mode in options.modes]
    if shape.rank:
        # On chip a map has one tile at most, or few.
        named = [name for name in VARIANTS if not name.endswith("on_chip")]
        passes = [dataclasses.replace(one, variant=name) for one in passes for name in named]
    else:
        scanned = [one for one in passes if one.mode != "training"]  # the same kernel as in inference
        passes = [dataclasses.replace(one, direction=name) for one in scanned for name in options.directions]
    for one in passes:
        rows += time_tiles(one, search, options.num_tiles)
    return rows


def tiny(shape: KernelShape) -> KernelShape:
    """Returns the same kind of map for the interpreter."""
    sizes = dict(batch=1, height=2, width=2, channels=8, weight_channels=8, rank=min(shape.rank, 8))
    return dataclasses.replace(shape, **sizes)


def show(row: dict[str, Any]) -> None:
    """Prints a row."""
    words = [row[key] for key in ("shape", "variant", "direction", "mode") if key in row]
    tile = ", ".join(f"{key} {value}" for key, value in row.get("tile", {}).items())
    time = f"{row['milliseconds']:.4f} ms" if row["status"] == "timed" else row.get("note", "")
    print(*words, f"{row['status']}: {time}", tile, flush=True)


def define_flags() -> None:
    flags.DEFINE_list("shapes", list(GROUPS), "Groups or names in experiments/benchmarks/shapes.py.")
    flags.DEFINE_list("what", list(WHAT), "Some of variants and tiles.")
    flags.DEFINE_list("modes", list(MODES), "Some of inference, training and backward.")
    flags.DEFINE_list("directions", list(DIRECTIONS), "Directions of line scans.")
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Dtype of the maps whose tiles are timed.")
    flags.DEFINE_integer("num_tiles", 12, "How many tiles to try, the best by the estimate.", lower_bound=1)
    flags.DEFINE_integer("repeats", 30, "Timed runs, at most.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the inputs.")
    flags.DEFINE_string("folder", None, "Another folder than pallas_kernels/mosaic/measured.")
    flags.DEFINE_bool("dry", False, "Two tiles, interpreted on tiny maps; needs --folder.")


def main() -> None:
    options = flags.FLAGS
    device_time.prepare_environment()
    shapes, present = select(options.shapes), card.present()
    if options.dry and not options.folder:
        raise ValueError("folder: expected one where --dry is given, so that no invented time is kept; got none")
    if isinstance(present, str) and not options.dry:
        raise ValueError(f"nothing to time: {present}")
    for flag, known in (("what", WHAT), ("modes", MODES), ("directions", DIRECTIONS)):
        chosen(flag, known)
    if options.dry:
        shapes = tuple(tiny(shape) for shape in shapes)
    clock, why = ("host", "dry") if options.dry else device_time.choose_clock()
    print(f"clock: {clock} {why}")
    stamp = provenance.stamp()
    search = Search(
        report=show,
        folder=Path(options.folder or measured.FOLDER),
        about={key: stamp[key] for key in ("command", "commit", "date")},
        clock=clock,
        repeats=options.repeats,
        seed=options.seed,
        dry=options.dry,
    )
    rows = [row for shape in shapes for row in tune(shape, search, options)]
    wrong = [row for row in rows if row["status"] in ("WRONG", "failed")]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(rows)} wrong or failed, the first: {wrong[0]}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
