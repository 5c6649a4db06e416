"""Times the most promising tiles of the line scan on this card, and keeps the fastest.

    python -m experiments.benchmarks.tune --shapes=gspn_t,sdxl --directions=down,right

Needs a card that the kernels run on. A tile whose results differ from those of the planned tile by more than rounding
is refused. A tile that is at least 3% faster than the estimate's choice goes into
pallas_kernels/mosaic/measured_tiles.json, under the card's name. --dry interprets two tiles on shrunken maps and needs
--output: it shows that the program works and measures nothing.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import command_line
from experiments.benchmarks import device_time
from experiments.benchmarks.gate import rms_ratio
from experiments.benchmarks.options import chosen
from experiments.benchmarks.scans import CANDIDATES, DIRECTIONS, DTYPES, ScanCase, shrink
from experiments.benchmarks.shapes import GROUPS, KernelShape, select
from pallas_kernels.mosaic import card, tiles
from pallas_kernels.mosaic.forms import Form
from pallas_kernels.mosaic.operations import Kernels
from pallas_kernels.tolerances import TOLERANCES

LEAST_GAIN = 0.03
INPUT_SETS = 3  # in rotation, so that the cache is not measured
PASSES = ("forward", "backward")


def tune(
    shape: KernelShape,
    direction: str,
    pass_: str,
    dtype: str,
    *,
    num_tiles: int,
    clock: str,
    repeats: int = 30,
    seed: int = 0,
    dry: bool = False,
) -> tuple[str, tiles.Tile] | None:
    """Times the planned tile and the `num_tiles` best ones by the estimate.

    Returns:
        The key of the work and its fastest tile; None where the planned tile stays.
    """
    kernels = Kernels(interpret=dry)
    scan: Any = kernels.scan_forward if pass_ == "forward" else kernels.scan_backward
    case = ScanCase(CANDIDATES["mosaic"], shape, direction, shape.chunk, dtype, pass_)
    sets = []
    for key in jax.random.split(jax.random.key(seed), INPUT_SETS):
        x, logits, lam, grad_h = case.inputs(key)
        sets.append((x, logits, lam) if pass_ == "forward" else (x, logits, lam, x, grad_h))  # h: any map will do
    x, logits, lam = sets[0][:3]
    loads, stores = ((x, lam), (x,)) if pass_ == "forward" else ((x, lam, x, x), (x, lam))
    form = Form(pass_, x, logits, loads, stores, direction, shape.chunk, None, dry)
    present = card.planned_for()
    ranked = sorted(tiles.candidates(form.work, present), key=lambda tile: form.work.seconds(tile, present))
    milliseconds: dict[tiles.Tile, float] = {}
    wanted = None
    for tile in dict.fromkeys([form.tile, *ranked[:num_tiles]]):
        program = functools.partial(scan, direction=direction, chunk=shape.chunk, from_logits=True, tile=tile)
        compiled = jax.jit(program).lower(*sets[0]).compile()
        found = jax.tree.leaves(compiled(*sets[0]))
        wanted = wanted or found
        error = max(float(rms_ratio(one, want)) for one, want in zip(found, wanted, strict=True))
        if not error <= TOLERANCES[dtype]:
            print(f"  {tile}: REFUSED, RMS ratio {error:.3g} to the planned tile's results")
            continue
        timing = device_time.measure(
            lambda index, compiled=compiled: compiled(*sets[index % INPUT_SETS]),
            clock=clock, most_runs=repeats, seconds=0.02 if dry else 0.2,
        )  # fmt: skip
        milliseconds[tile] = timing.host_ms if dry or timing.median_ms is None else timing.median_ms
        print(f"  {tile}: {milliseconds[tile]:.4f} ms", flush=True)
    best = min(milliseconds, key=lambda tile: milliseconds[tile])
    if milliseconds[best] > (1 - LEAST_GAIN) * milliseconds.get(form.tile, float("inf")):
        return None
    return form.work.key, best


def keep(path: Path, name: str, found: dict[str, tiles.Tile]) -> None:
    """Adds tiles to the table at `path`, under the card's name."""
    table = json.loads(path.read_text()) if path.exists() else {}
    rows = table.setdefault(name, {})
    rows.update({key: vars(tile) for key, tile in found.items()})
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def define_flags() -> None:
    flags.DEFINE_list("shapes", list(GROUPS), "Groups or names in experiments/benchmarks/shapes.py.")
    flags.DEFINE_list("directions", list(DIRECTIONS), "Directions of the scans.")
    flags.DEFINE_list("passes", list(PASSES), "Some of forward and backward.")
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Dtype of the maps.")
    flags.DEFINE_integer("num_tiles", 12, "How many tiles to try, the best by the estimate.", lower_bound=1)
    flags.DEFINE_integer("repeats", 30, "Timed runs of a tile, at most.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the inputs.")
    flags.DEFINE_string("output", None, "Another table than pallas_kernels/mosaic/measured_tiles.json.")
    flags.DEFINE_bool("dry", False, "Two tiles, interpreted on shrunken maps; needs --output.")


def main() -> None:
    given = flags.FLAGS
    device_time.prepare_environment()
    shapes, present = select(given.shapes), card.present()
    if given.dry and not given.output:
        raise ValueError("output: expected a file where --dry is given, so that no invented time enters the table")
    if isinstance(present, str) and not given.dry:
        raise ValueError(f"nothing to time: {present}")
    clock, why = ("host", "dry") if given.dry else device_time.choose_clock()
    print(f"clock: {clock} {why}")
    options: Any = dict(clock=clock, repeats=given.repeats, seed=given.seed, dry=given.dry)
    options["num_tiles"] = min(given.num_tiles, 2) if given.dry else given.num_tiles
    found = {}
    directions, passes = chosen("directions", DIRECTIONS), chosen("passes", PASSES)
    for shape in shapes:
        for direction in directions:
            for pass_ in passes:
                print(f"{shape.name} {direction} {pass_} {given.dtype}")
                result = tune(shrink(shape) if given.dry else shape, direction, pass_, given.dtype, **options)
                if result is not None:
                    found[result[0]] = result[1]
    path = Path(given.output or tiles.MEASURED)
    keep(path, "dry" if given.dry else card.planned_for().name, found)
    print(f"{len(found)} tiles kept in {path.name}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
