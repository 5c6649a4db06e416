"""Times the variants of a propagation and the tiles of its launches. Each result is checked and reported at once."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.passes import MODES, Choose, Pass, as_planned, number_of_sets
from experiments.benchmarks.shapes import KernelShape
from pallas_kernels.choices import VARIANTS
from pallas_kernels.mosaic import card, estimate, measured, plans, variants
from pallas_kernels.mosaic.tiles import Problem, Tile

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Search:
    """How results are measured, and where they go.

    Attributes:
        report: gets each row as soon as it is measured.
        folder: of the files of `pallas_kernels.mosaic.measured`; None keeps nothing there.
        about: command, commit and date of these files.
        clock: as `device_time.choose_clock` returns it.
        repeats: timed runs, at most.
        seconds: length of a measurement, about.
        seed: of the inputs.
        dry: interprets the kernels, and keeps the host's times under the name of no card.
    """

    report: Callable[[Row], None]
    folder: Path | None
    about: Mapping[str, str]
    clock: str
    repeats: int = 50
    seconds: float = 0.2
    seed: int = 0
    dry: bool = False

    @property
    def card_name(self) -> str:
        return "dry" if self.dry else card.planned_for().name

    @property
    def implementation(self) -> str:
        return "mosaic_interpret" if self.dry else "mosaic"

    def keep(self, **what: Any) -> None:
        if self.folder is not None:
            measured.add(self.card_name, about=self.about, folder=self.folder, **what)

    def inputs(self, one: Pass) -> tuple[Any, ...]:
        return one.inputs(jax.random.key(self.seed))

    def measure(self, one: Pass, inputs: tuple[Any, ...], right: Any, choose: Choose = as_planned) -> Row:
        """Checks and times a pass.

        Args:
            one: the pass.
            inputs: of the check, and of the first timed run.
            right: what the pass must return for them; None if nothing is compared.
            choose: of the launches' tiles.

        Returns:
            A row with "status": "timed", or "WRONG", "not run", "out of memory" or "failed" with a "note".
        """
        row = {"kind": "time"} | one.columns()
        try:
            sets = [one.arguments(inputs, choose)]
            compiled = one.compiled(sets[0], choose)
            start = time.perf_counter()
            found = jax.block_until_ready(compiled(*sets[0]))
            row |= {"milliseconds": 1e3 * (time.perf_counter() - start)} if self.dry else {}
            if right is not None:
                verdict = one.judge(found, right)
                row["error"] = verdict.error
                if not verdict.passed:
                    return row | {"status": "WRONG", "note": verdict.reason}
            row |= {"status": "timed", "launches": self.launches(one, sets[0], choose)}
            if self.dry:
                return row
            keys = jax.random.split(jax.random.key(self.seed + 1), number_of_sets(sets[0]))
            sets += [one.arguments(one.inputs(key), choose) for key in keys[1:]]
            how = dict(clock=self.clock, most_runs=self.repeats, seconds=self.seconds)
            return row | one.time(compiled, sets, **how)
        except ValueError as error:  # the variant does not fit
            return row | {"status": "not run", "note": str(error)[:300]}
        except jax.errors.JaxRuntimeError as error:
            status = "out of memory" if "RESOURCE_EXHAUSTED" in str(error) else "failed"
            return row | {"status": status, "note": str(error)[:300]}

    def launches(self, one: Pass, arguments: tuple[Any, ...], choose: Choose = as_planned) -> list[Row]:
        """Returns the launches of a pass, with the estimate of their milliseconds."""
        present = card.planned_for()
        found = {problem: choose(problem, present) or tile for problem, tile in one.launches(arguments).items()}
        return [
            {
                "problem": dataclasses.asdict(problem),
                "tile": dataclasses.asdict(tile),
                "estimated_ms": 1e3 * estimate.seconds(problem, tile, present),
            }
            for problem, tile in found.items()
        ]


def propagation_of(shape: KernelShape, dtype: str = "bfloat16") -> variants.Propagation:
    pixels = shape.batch, shape.height, shape.width
    return variants.Propagation((*pixels, shape.channels), dtype, shape.weight_channels, shape.chunk, shape.rank)


def time_variants(
    shape: KernelShape, search: Search, *, modes: Sequence[str] = MODES, beside: Sequence[str] = ()
) -> Iterator[Row]:
    """Times each variant of the kernels in each mode, and keeps the times; yields and reports the rows.

    Args:
        shape: a map with a rank.
        search: how.
        modes: some of `MODES`.
        beside: implementations without variants that are timed as well.
    """
    fields = dataclasses.asdict(propagation_of(shape))
    for mode in modes:
        first = Pass(shape, mode, implementation=search.implementation)
        inputs = search.inputs(first)
        right = first.right_results(inputs)
        # On chip there is no backward kernel.
        names = [name for name in VARIANTS if mode != "backward" or not name.endswith("on_chip")]
        passes = [dataclasses.replace(first, variant=name) for name in names]
        for one in (*passes, *(dataclasses.replace(first, implementation=name) for name in beside)):
            row = search.measure(one, inputs, right)
            if one.variant is not None and row["status"] == "timed":
                search.keep(propagation=fields, milliseconds={mode: {one.variant: row["milliseconds"]}})
            search.report(row)
            yield row


def time_tiles(one: Pass, search: Search, num_tiles: int) -> Iterator[Row]:
    """Times the planned tile and the best ones by the estimate, for each kernel of a pass.

    Yields and reports a row for each tile, and keeps the fastest so far.
    """
    inputs, present = search.inputs(one), card.planned_for()
    right = one.right_results(inputs)
    for problem, planned in one.launches(one.arguments(inputs)).items():
        ranked = sorted(plans.candidates(problem, present), key=lambda tile: estimate.seconds(problem, tile, present))
        best = float("inf")
        for tile in dict.fromkeys([planned, *ranked[:num_tiles]]):
            row = search.measure(one, inputs, right, _only(problem, tile))
            row |= {"key": problem.key, "tile": dataclasses.asdict(tile), "planned": tile == planned}
            if row["status"] == "timed" and row["milliseconds"] < best:
                best = row["milliseconds"]
                search.keep(tiles={problem.key: dataclasses.asdict(tile) | {"milliseconds": best}})
            search.report(row)
            yield row


def _only(problem: Problem, tile: Tile) -> Choose:
    """Returns the choice that gives this problem the tile, and leaves others their planned one."""
    return lambda asked, card: tile if asked == problem else None
