"""The times that decide the design: variants, line scans, attention beside them, lines and launches, train steps."""

import dataclasses
import functools
from typing import Any

import jax

from experiments.benchmarks import attention, device_time
from experiments.benchmarks.first_card.context import Context
from experiments.benchmarks.measurement import normal, with_gradients
from experiments.benchmarks.passes import MODES, Pass
from experiments.benchmarks.search import Search, time_tiles, time_variants
from experiments.benchmarks.shapes import KernelShape, select
from pallas_kernels import line_scan_from_logits
from pallas_kernels.mosaic import estimate, plans
from pallas_kernels.mosaic.card import Card
from pallas_kernels.mosaic.tiles import Problem, Tile

ATTENDED = ("gspn_t_stage3", "width1152_16", "width1152_32", "sdxl_1k_level1", "sdxl_2k_level1", "sdxl_4k_level2")
TILES_OF_LAYER = 5  # tried in each pass, beside the planned one
SMALL = KernelShape("small", 1, 2, 2, 8, rank=8)  # for the interpreter


def variants(context: Context, name: str) -> None:
    """Times each variant of a layer in each mode, and `xla` beside them where it takes no minutes."""
    (shape,) = (SMALL,) if context.dry else select([name])
    modes = MODES[:1] if context.dry else MODES
    beside = ["xla"] if not context.dry and shape.batch * shape.height * shape.width * shape.channels < 2**27 else []
    _refuse(list(time_variants(shape, context.search(), modes=modes, beside=beside)))


def tiles(context: Context, name: str) -> None:
    """Times tiles of a layer's kernels, forward in training and backward, and keeps the fastest."""
    (shape,) = (SMALL,) if context.dry else select([name])
    search = context.search()
    for mode in MODES[2:] if context.dry else MODES[1:]:
        one = Pass(shape, mode, variant="low_rank", implementation=search.implementation)
        _refuse(list(time_tiles(one, search, 0 if context.dry else TILES_OF_LAYER)))


def scans(context: Context, name: str) -> None:
    """Times line scans, down and right, forward and backward."""
    (shape,) = (dataclasses.replace(SMALL, rank=0),) if context.dry else select([name])
    search, rows = context.search(), []
    for direction in ("down",) if context.dry else ("down", "right"):
        for mode in MODES[:1] if context.dry else ("inference", "backward"):
            one = Pass(shape, mode, direction=direction, implementation=search.implementation)
            inputs = search.inputs(one)
            rows.append(search.measure(one, inputs, one.right_results(inputs)))
            context.write(rows[-1])
    _refuse(rows)


def attention_beside(context: Context) -> None:
    """Times flash attention with as many tokens as the layers' maps have pixels, forward, and with its gradients."""
    candidate = "softmax_attention" if context.dry else "flash_attention"
    search = context.search()
    for shape in (SMALL,) if context.dry else select(ATTENDED):
        size = shape.batch, shape.height * shape.width, attention.heads(shape.channels), attention.HEAD_WIDTH
        q, k, v, grad = (normal(key, size, "bfloat16") for key in jax.random.split(jax.random.key(0), 4))
        attend: Any = functools.partial(attention.attend, candidate)
        for passes, program, given in (
            ("forward", attend, (q, k, v)), ("both", with_gradients(attend), (q, k, v, grad)),
        ):  # fmt: skip
            row = {"kind": "attention", "shape": shape.name, "candidate": candidate, "pass": passes}
            context.write(row | _time(search, program, *given))


def lines(context: Context) -> None:
    """Times a line of one CTA, and a launch: maps whose walks differ in their length alone, and launches in a row."""
    search = context.search()
    side, least = (2, 1) if context.dry else (64, 8)

    def walks_one_chunk(problem: Problem, card: Card) -> Tile | None:
        found = [tile for tile in plans.candidates(problem, card) if tile.chunks == 1 and not tile.ghost]
        return min(found, key=lambda tile: estimate.seconds(problem, tile, card), default=None)

    kinds = (("line scan", 0, "down", None), ("scans", 8, None, "scans"), ("low_rank", 8, None, "low_rank"))
    for name, rank, direction, variant in kinds[:1] if context.dry else kinds:
        for mode in MODES[:1] if context.dry else ("inference", "backward"):
            found = []
            for chunk in (side, least):
                shape = KernelShape(f"lines of {chunk}", 1, side, side, 16, chunk=chunk, rank=rank)
                options: Any = dict(variant=variant, direction=direction, implementation=search.implementation)
                one = Pass(shape, mode, **options)
                found.append(search.measure(one, search.inputs(one), None, walks_one_chunk))
                context.write(found[-1])
            if all(row["status"] == "timed" for row in found):
                each = (found[0]["milliseconds"] - found[1]["milliseconds"]) / (side - least)
                first = found[1]["milliseconds"] - least * each
                row = {"kind": "lines", "kernel": name, "mode": mode, "us_per_line": 1e3 * each}
                context.write(row | {"us_before_the_first_line": 1e3 * first})
    x, logits, lam, _ = Pass(KernelShape("launches", 1, 2, 16, 16), direction="down").inputs(jax.random.key(0))
    times = []
    for count in (1, 2 if context.dry else 9):

        def chain(x: jax.Array, count: int = count) -> jax.Array:
            options: Any = dict(direction="down", implementation=search.implementation)
            for _ in range(count):
                x = line_scan_from_logits(x, logits, lam, **options)
            return x

        times.append((count, _time(search, chain, x)["milliseconds"]))
    (one, first), (several, last) = times
    context.write({"kind": "launches", "us_per_launch": 1e3 * (last - first) / (several - one)})


def _time(search: Search, program: Any, *given: Any) -> dict[str, Any]:
    """Returns the milliseconds of a program, or why there are none."""
    try:
        compiled = jax.jit(program).lower(*given).compile()
        how: Any = dict(clock=search.clock, most_runs=search.repeats, seconds=0.0 if search.dry else search.seconds)
        timing = device_time.measure(lambda _: compiled(*given), **how)
    except (ValueError, RuntimeError) as error:  # cuDNN has no kernel for it, or the card no memory
        return {"status": "failed", "note": str(error)[:300], "milliseconds": float("nan")}
    return {"status": "timed", "milliseconds": timing.host_ms if timing.median_ms is None else timing.median_ms}


def _refuse(rows: list[dict[str, Any]]) -> None:
    """Raises RuntimeError if a result is wrong, or nothing was timed."""
    wrong = [row for row in rows if row["status"] in ("WRONG", "failed")]
    if wrong or not any(row["status"] == "timed" for row in rows):
        raise RuntimeError(f"{len(wrong)} of {len(rows)} wrong or failed: {(wrong or rows)[0].get('note')}")
