"""Finds the cheapest kernels of a propagation for each layer's map, and writes the table that the layers choose from.

    python -m experiments.choose_paths --replace

On a card that the kernels run on it times each path; without one it takes the estimates by which tiles are ranked, plus
the bytes that making the maps moves, and says so in the table. Either way the time to make maps in memory counts.
Writes pallas_kernels/mosaic/paths.json; without --replace the rows of other shapes stay,
and times of one kind do not enter a table of the other.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import device_time
from experiments.kernel_shapes import CHOSEN, KernelShape, select
from pallas_kernels import UpProjection, propagate, propagate_low_rank
from pallas_kernels.dispatch import PATHS
from pallas_kernels.mosaic import card, paths
from pallas_kernels.up_projection import maps_of

DTYPE = "bfloat16"
COPY_BANDWIDTH = 4.3e12  # bytes a second, of a large copy on an H200
NAMES = ("inference", "training", "backward", "given_inference", "given_training")

Times = dict[str, dict[str, float]]  # mode, then path: milliseconds


def work_of(shape: KernelShape) -> paths.Work:
    pixels = shape.batch, shape.height, shape.width
    return paths.Work((*pixels, shape.channels), DTYPE, shape.weight_channels, shape.chunk, shape.rank)


def estimate(shape: KernelShape) -> Times:
    """By the seconds of the planned tiles on an H200."""
    work = work_of(shape)
    elements = shape.batch * shape.height * shape.width * shape.channels
    times: Times = {name: {} for name in NAMES}

    def seconds(path: str, kernel: str) -> float | None:
        try:
            forms = paths.forms(work, path, kernel=kernel).forms
        except ValueError:
            return None
        found = [form.work.seconds(form.tile, card.planned_for()) for form in forms]
        return found[0] if path.endswith(paths.ON_CHIP) else sum(found)

    # Twelve logits and twelve other maps, of 16 bits, are written.
    making = 1e3 * 24 * elements * (1 + shape.weight_channels / shape.channels) / COPY_BANDWIDTH
    keeping = 1e3 * 8 * elements / COPY_BANDWIDTH
    for path in PATHS:
        made = path.startswith("low_rank")
        forward = seconds(path, "forward")
        if forward is None:
            continue
        forward *= 1e3
        times["inference"][path] = forward + (0 if made else making)
        times["training"][path] = forward + keeping + (0 if made else making)
        if not made:
            times["given_inference"][path], times["given_training"][path] = forward, forward + keeping
        if not path.endswith(paths.ON_CHIP):
            backward = seconds(path, "backward")
            assert backward is not None
            times["backward"][path] = 1e3 * backward + (0 if made else making)
    return times


def measure(shape: KernelShape, clock: str) -> Times:
    """On the card, inputs drawn at random."""
    keys = jax.random.split(jax.random.key(0), 6)
    pixels = shape.batch, shape.height, shape.width
    draw: Callable[..., jax.Array] = functools.partial(jax.random.normal, dtype=DTYPE)
    x, proxy = draw(keys[0], (*pixels, shape.channels)), draw(keys[1], (*pixels, shape.rank))
    columns = (4, 3, shape.weight_channels), *[(4, shape.channels)] * 3
    up = UpProjection(*(draw(k, (shape.rank, *c)) for k, c in zip(keys[2:], columns, strict=True)))
    merge, times = jnp.ones(4), {name: dict[str, float]() for name in NAMES}

    def clock_in(name: str, path: str, program: Callable[..., Any], *inputs: Any) -> None:
        """Enters the milliseconds, unless the program does not fit in memory."""
        try:
            compiled = jax.jit(program).lower(*inputs).compile()
            timing = device_time.measure(lambda _: compiled(*inputs), clock=clock, seconds=0.2)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{shape.name}: {name} by {path} does not fit in memory", flush=True)
        else:
            times[name][path] = timing.host_ms if timing.median_ms is None else timing.median_ms

    for path in PATHS:
        try:
            paths.forms(work_of(shape), path)
        except ValueError:
            continue
        run = functools.partial(propagate_low_rank, chunk=shape.chunk, implementation="mosaic", path=path)
        clock_in("inference", path, run, x, proxy, up, merge)
        # y and what is kept for the gradient, and then the gradient of that.
        clock_in("training", path, lambda *inputs, run=run: jax.vjp(run, *inputs), x, proxy, up, merge)
        if path in times["training"] and not path.endswith(paths.ON_CHIP):
            clock_in("backward", path, lambda *inputs, run=run: jax.vjp(run, *inputs)[1](x), x, proxy, up, merge)
            if path in times["backward"]:
                times["backward"][path] -= times["training"][path]
        if path.startswith("fused"):
            given = functools.partial(propagate, chunk=shape.chunk, implementation="mosaic", path=path)
            maps = jax.jit(maps_of)(proxy, up)
            clock_in("given_inference", path, given, x, *maps, merge)
            clock_in("given_training", path, lambda *inputs, given=given: jax.vjp(given, *inputs), x, *maps, merge)
    return times


def row(shape: KernelShape, times: Times) -> dict[str, Any]:
    """Of the table: the map, the cheapest path of each mode, and all milliseconds."""
    fields = ("name", "batch", "height", "width", "channels", "weight_channels", "chunk", "rank")
    cheapest = {name: min(times[name], key=lambda path: times[name][path]) for name in NAMES}
    rounded = {name: {path: float(f"{ms:.4g}") for path, ms in times[name].items()} for name in NAMES}
    return {field: getattr(shape, field) for field in fields} | cheapest | {"milliseconds": rounded}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    device_time.prepare_environment()
    present = card.present()
    if isinstance(present, str):
        basis, times = f"estimated for an {card.H200.name}, not measured", estimate
    else:
        clock, _ = device_time.choose_clock()
        basis, times = f"measured on an {present.name}", functools.partial(measure, clock=clock)
    file = Path(options.out or paths.TABLE)
    before = json.loads(file.read_text()) if file.exists() else {"basis": basis, "rows": []}
    kept = {} if options.replace else {known["name"]: known for known in before["rows"]}
    if kept and before["basis"] != basis:
        print(f"{file.name} holds times {before['basis']}, these are {basis}: --replace drops them", file=sys.stderr)
        return 1
    for shape in select(options.shapes):
        kept[shape.name] = found = row(shape, times(shape))
        print(f"{shape.name}: " + ", ".join(f"{name} {found[name]}" for name in NAMES), flush=True)
    order = [shape.name for shape in CHOSEN]
    rows = sorted(kept.values(), key=lambda known: order.index(known["name"]))
    command = "python -m experiments.choose_paths"
    file.write_text(json.dumps({"basis": basis, "command": command, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} maps, {basis}")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.choose_paths", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=[shape.name for shape in CHOSEN],
                        help="groups or names of experiments/kernel_shapes.py whose layers have a proxy")  # fmt: skip
    parser.add_argument("--replace", action="store_true", help="drop what the table holds; else other rows stay")
    parser.add_argument("--out", help="another table than pallas_kernels/mosaic/paths.json")
    options = parser.parse_args(arguments)
    try:
        chosen = select(options.shapes)
    except ValueError as error:
        parser.error(str(error))
    without = [shape.name for shape in chosen if not shape.rank]
    if without:
        parser.error(f"shapes: expected maps of layers, which have a proxy; got {', '.join(without)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
