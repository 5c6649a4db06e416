"""Finds the cheapest kernels of a propagation for each layer's map, and writes the table that the layers choose from.

    python -m experiments.benchmarks.choose_variants --replace

On a card that the kernels run on, it times each variant. Without one it takes the estimates that rank tiles, adds the
bytes that making the maps moves, and says so in the table. Either way the time to make maps in memory counts. Writes
pallas_kernels/mosaic/variants.json. Without --replace the rows of other shapes stay, and measured times never join
estimated ones.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import command_line
from experiments.benchmarks import device_time
from experiments.benchmarks.shapes import CHOSEN, KernelShape, select_layers
from pallas_kernels import UpProjection, propagate, propagate_low_rank
from pallas_kernels.choices import VARIANTS
from pallas_kernels.mosaic import card, variants
from pallas_kernels.mosaic.card import COPY_BANDWIDTH
from pallas_kernels.up_projection import maps_of

DTYPE = "bfloat16"
MODES = ("inference", "training", "backward", "given_inference", "given_training")

Times = dict[str, dict[str, float]]  # milliseconds by mode, then by variant


def work_of(shape: KernelShape) -> variants.Work:
    pixels = shape.batch, shape.height, shape.width
    return variants.Work((*pixels, shape.channels), DTYPE, shape.weight_channels, shape.chunk, shape.rank)


def estimate(shape: KernelShape) -> Times:
    """Returns estimates from the planned tiles on an H200."""
    work = work_of(shape)
    elements = shape.batch * shape.height * shape.width * shape.channels
    times: Times = {name: {} for name in MODES}

    def seconds(variant: str, kernel: str) -> float | None:
        try:
            forms = variants.forms(work, variant, kernel=kernel).forms
        except ValueError:
            return None
        found = [form.work.seconds(form.tile, card.planned_for()) for form in forms]
        return found[0] if variant.endswith(variants.ON_CHIP) else sum(found)

    # Twelve logits and twelve other maps of 16 bits are written.
    making = 1e3 * 24 * elements * (1 + shape.weight_channels / shape.channels) / COPY_BANDWIDTH
    keeping = 1e3 * 8 * elements / COPY_BANDWIDTH
    for variant in VARIANTS:
        made = variant.startswith("low_rank")
        forward = seconds(variant, "forward")
        if forward is None:
            continue
        forward *= 1e3
        times["inference"][variant] = forward + (0 if made else making)
        times["training"][variant] = forward + keeping + (0 if made else making)
        if not made:
            times["given_inference"][variant], times["given_training"][variant] = forward, forward + keeping
        if not variant.endswith(variants.ON_CHIP):
            backward = seconds(variant, "backward")
            assert backward is not None
            times["backward"][variant] = 1e3 * backward + (0 if made else making)
    return times


def measure(shape: KernelShape, clock: str) -> Times:
    """Returns times on the card, with random inputs."""
    keys = jax.random.split(jax.random.key(0), 6)
    pixels = shape.batch, shape.height, shape.width
    draw: Callable[..., jax.Array] = functools.partial(jax.random.normal, dtype=DTYPE)
    x, proxy = draw(keys[0], (*pixels, shape.channels)), draw(keys[1], (*pixels, shape.rank))
    columns = (4, 3, shape.weight_channels), *[(4, shape.channels)] * 3
    up = UpProjection(*(draw(k, (shape.rank, *c)) for k, c in zip(keys[2:], columns, strict=True)))
    merge, times = jnp.ones(4), {name: dict[str, float]() for name in MODES}

    def clock_in(name: str, variant: str, program: Callable[..., Any], *inputs: Any) -> None:
        """Enters the milliseconds, unless the program does not fit in memory."""
        try:
            compiled = jax.jit(program).lower(*inputs).compile()
            timing = device_time.measure(lambda _: compiled(*inputs), clock=clock, seconds=0.2)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{shape.name}: {name} by {variant} does not fit in memory", flush=True)
        else:
            times[name][variant] = timing.host_ms if timing.median_ms is None else timing.median_ms

    for variant in VARIANTS:
        try:
            variants.forms(work_of(shape), variant)
        except ValueError:
            continue
        run = functools.partial(propagate_low_rank, chunk=shape.chunk, implementation="mosaic", variant=variant)
        clock_in("inference", variant, run, x, proxy, up, merge)
        # y and what the gradient needs, and then that gradient.
        clock_in("training", variant, lambda *inputs, run=run: jax.vjp(run, *inputs), x, proxy, up, merge)
        if variant in times["training"] and not variant.endswith(variants.ON_CHIP):
            clock_in("backward", variant, lambda *inputs, run=run: jax.vjp(run, *inputs)[1](x), x, proxy, up, merge)
            if variant in times["backward"]:
                times["backward"][variant] -= times["training"][variant]
        if variant.startswith("fused"):
            given = functools.partial(propagate, chunk=shape.chunk, implementation="mosaic", variant=variant)
            maps = jax.jit(maps_of)(proxy, up)
            clock_in("given_inference", variant, given, x, *maps, merge)
            clock_in("given_training", variant, lambda *inputs, given=given: jax.vjp(given, *inputs), x, *maps, merge)
    return times


def row(shape: KernelShape, times: Times) -> dict[str, Any]:
    """Returns a row of the table: the map, the cheapest variant in each mode, and all milliseconds."""
    fields = ("name", "batch", "height", "width", "channels", "weight_channels", "chunk", "rank")
    cheapest = {name: min(times[name], key=lambda variant: times[name][variant]) for name in MODES}
    rounded = {name: {variant: float(f"{ms:.4g}") for variant, ms in times[name].items()} for name in MODES}
    return {field: getattr(shape, field) for field in fields} | cheapest | {"milliseconds": rounded}


def update(path: Path, shapes: Sequence[KernelShape], *, replace: bool = False) -> str:
    """Writes the rows of the shapes into the table at `path` and returns where its times come from.

    Raises:
        ValueError: the table holds estimates and these times are measured, or the other way round.
    """
    present = card.present()
    if isinstance(present, str):
        basis, times = f"estimated for an {card.H200.name}, not measured", estimate
    else:
        clock, _ = device_time.choose_clock()
        basis, times = f"measured on an {present.name}", functools.partial(measure, clock=clock)
    before = json.loads(path.read_text()) if path.exists() else {"basis": basis, "rows": []}
    kept = {} if replace else {known["name"]: known for known in before["rows"]}
    if kept and before["basis"] != basis:
        raise ValueError(f"{path.name} holds times {before['basis']}, these are {basis}: --replace drops them")
    for shape in shapes:
        kept[shape.name] = found = row(shape, times(shape))
        print(f"{shape.name}: " + ", ".join(f"{mode} {found[mode]}" for mode in MODES), flush=True)
    order = [shape.name for shape in CHOSEN]
    rows = sorted(kept.values(), key=lambda known: order.index(known["name"]))
    command = "python -m experiments.benchmarks.choose_variants"
    path.write_text(json.dumps({"basis": basis, "command": command, "rows": rows}, indent=1) + "\n")
    return basis


def define_flags() -> None:
    flags.DEFINE_list("shapes", [shape.name for shape in CHOSEN], "Layers in experiments/benchmarks/shapes.py.")
    flags.DEFINE_bool("replace", False, "Drops the rows of other shapes.")
    flags.DEFINE_string("output", None, "Another table than pallas_kernels/mosaic/variants.json.")


def main() -> None:
    given = flags.FLAGS
    device_time.prepare_environment()
    shapes = select_layers(given.shapes)
    basis = update(Path(given.output or variants.TABLE), shapes, replace=given.replace)
    print(f"{len(shapes)} maps, {basis}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
