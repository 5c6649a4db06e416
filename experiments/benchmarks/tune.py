"""Times the most promising tiles of the line scan on this card, and keeps the fastest.

    python -m experiments.tune_tiles --shapes=gspn_t,sdxl --directions=down,right

Needs jax and numpy alone, and a card that the kernels run on. A tile whose results are not those of the planned one, to
rounding, is refused. What is at least 3% faster than the estimate's choice is written to
pallas_kernels/mosaic/measured_tiles.json, under the card's name. --dry interprets two tiles on shrunken maps and needs
--out: it shows that the program works and measures nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import device_time
from experiments.kernel_cases import DIRECTIONS, shrink
from experiments.kernel_contenders import draw_inputs
from experiments.kernel_gate import TOLERANCES, rms_ratio
from experiments.kernel_shapes import GROUPS, KernelShape, select
from pallas_kernels.mosaic import card, tiles
from pallas_kernels.mosaic.forms import Form
from pallas_kernels.mosaic.operations import Kernels

LEAST_GAIN = 0.03
INPUT_SETS = 3  # in rotation, so that the cache is not what is measured


def tune(shape: KernelShape, direction: str, pass_: str, options: argparse.Namespace) -> tuple[str, tiles.Tile] | None:
    """The key of the work and its fastest tile; None where the planned one stays."""
    kernels = Kernels(interpret=options.dry)
    scan: Any = kernels.scan_forward if pass_ == "forward" else kernels.scan_backward
    keys = jax.random.split(jax.random.key(options.seed), INPUT_SETS)
    sets = []
    for key in keys:
        x, logits, lam, grad_h = draw_inputs(key, "from_logits", shape, options.dtype, direction)
        sets.append((x, logits, lam) if pass_ == "forward" else (x, logits, lam, x, grad_h))  # h: any map is as good
    x, logits, lam = sets[0][:3]
    loads, stores = ((x, lam), (x,)) if pass_ == "forward" else ((x, lam, x, x), (x, lam))
    form = Form(pass_, x, logits, loads, stores, direction, shape.chunk, None, options.dry)
    present = card.planned_for()
    ranked = sorted(tiles.candidates(form.work, present), key=lambda tile: form.work.seconds(tile, present))
    milliseconds: dict[tiles.Tile, float] = {}
    wanted = None
    for tile in dict.fromkeys([form.tile, *ranked[: options.tiles]]):

        def program(*inputs, tile=tile):
            return scan(*inputs, direction=direction, chunk=shape.chunk, from_logits=True, tile=tile)

        compiled = jax.jit(program).lower(*sets[0]).compile()
        found = jax.tree.leaves(compiled(*sets[0]))
        wanted = wanted or found
        error = max(float(rms_ratio(one, want)) for one, want in zip(found, wanted, strict=True))
        if not error <= TOLERANCES[options.dtype]:
            print(f"  {tile}: REFUSED, RMS ratio {error:.3g} to the planned tile's results")
            continue
        timing = device_time.measure(
            lambda index, compiled=compiled: compiled(*sets[index % INPUT_SETS]),
            clock=options.clock, most_runs=options.repeats, seconds=0.02 if options.dry else 0.2,
        )  # fmt: skip
        milliseconds[tile] = timing.host_ms if options.dry or timing.median_ms is None else timing.median_ms
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    device_time.prepare_environment()
    present = card.present()
    if isinstance(present, str) and not options.dry:
        print(f"Nothing to time: {present}", file=sys.stderr)
        return 1
    options.clock, why = ("host", "dry") if options.dry else device_time.choose_clock()
    print(f"clock: {options.clock} {why}")
    found = {}
    for shape in select(options.shapes):
        for direction in options.directions:
            for pass_ in options.passes:
                print(f"{shape.name} {direction} {pass_} {options.dtype}")
                result = tune(shrink(shape) if options.dry else shape, direction, pass_, options)
                if result is not None:
                    found[result[0]] = result[1]
    keep(Path(options.out or tiles.MEASURED), "dry" if options.dry else card.planned_for().name, found)
    print(f"{len(found)} tiles kept in {options.out or tiles.MEASURED.name}")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(prog="python -m experiments.tune_tiles", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--shapes", type=names, default=list(GROUPS), help="groups or names of experiments/kernel_shapes.py")
    add("--directions", type=names, default=list(DIRECTIONS))
    add("--passes", type=names, default=["forward", "backward"])
    add("--dtype", choices=list(TOLERANCES), default="bfloat16")
    add("--tiles", type=int, default=12, help="tiles that are tried, the best of the estimate")
    add("--repeats", type=int, default=30, help="timed runs of a tile, at most")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--out", help="another table than pallas_kernels/mosaic/measured_tiles.json")
    add("--dry", action="store_true", help="two tiles, interpreted on shrunken maps; needs --out")
    options = parser.parse_args(arguments)
    for name, values, known in (
        ("directions", options.directions, DIRECTIONS),
        ("passes", options.passes, ("forward", "backward")),
    ):
        if not set(values) <= set(known):
            parser.error(f"{name}: expected some of {', '.join(known)}; got {', '.join(values)}")
    try:
        select(options.shapes)
    except ValueError as error:
        parser.error(str(error))
    if options.dry:
        if not options.out:
            parser.error("out: expected a file where --dry is given, so that nothing made up enters the table")
        options.tiles = min(options.tiles, 2)
    return options


if __name__ == "__main__":
    sys.exit(main())
