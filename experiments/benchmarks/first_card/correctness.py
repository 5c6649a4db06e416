"""Whether the kernels of each family are right on the card: against `lax.scan`, and bit-equal from run to run."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

from experiments.benchmarks import gate
from experiments.benchmarks.first_card import running
from experiments.benchmarks.first_card.context import Context
from experiments.benchmarks.passes import MODES, Pass
from experiments.benchmarks.shapes import KernelShape, select
from pallas_kernels.mosaic import estimate, plans
from pallas_kernels.mosaic.card import Card
from pallas_kernels.mosaic.tiles import Problem, Tile, overlaps

RUNS = 20


@dataclasses.dataclass(frozen=True)
class Family:
    """Kernels whose launches take the same kind of tile.

    Attributes:
        shape: name of a real map.
        small: a map for the interpreter and for sanitizers.
        takes: whether a tile of a problem is of the family.
        variant: of a propagation.
        direction: of a line scan.
    """

    shape: str
    small: KernelShape
    takes: Callable[[Problem, Tile], bool]
    variant: str | None = None
    direction: str | None = None


FAMILIES = {
    "scan": Family(
        "gspn_t_stage2", KernelShape("small", 1, 2, 2, 8, chunk=1, rank=8),
        lambda problem, tile: tile.warpgroups == 1 and not tile.ghost, variant="scans",
    ),
    "warpgroups": Family(
        "table1_128_b1_c32", KernelShape("small", 1, 17, 2, 8),
        lambda problem, tile: tile.warpgroups > 1, direction="right",
    ),
    "ghost": Family(
        "line_2048", KernelShape("small", 1, 2, 70, 8), lambda problem, tile: tile.ghost > 0, direction="down",
    ),
    "in_turn": Family(
        "gspn_t_stage1", KernelShape("small", 1, 2, 2, 8, rank=8),
        lambda problem, tile: problem.rank > 0 and not tile.overlap, variant="low_rank",
    ),
    "overlapping": Family(
        "sdxl_1k_level1", KernelShape("small", 1, 2, 2, 8, rank=8),
        lambda problem, tile: problem.rank > 0 and overlaps(tile, problem.resident > 0), variant="low_rank",
    ),
    "on_chip": Family(
        "gspn_t_stage4", KernelShape("small", 1, 2, 2, 8, rank=8),
        lambda problem, tile: problem.resident > 0, variant="low_rank_on_chip",
    ),
}  # fmt: skip


def check(context: Context, name: str, *, small: bool = False) -> None:
    """Compares each pass of a family with the reference, and its runs with each other; writes a row for each pass.

    Raises:
        RuntimeError: a pass is wrong, two runs differ, or no launch took a tile of the family.
    """
    family, small = FAMILIES[name], small or context.dry
    (shape,) = (family.small,) if small else select([family.shape])
    implementation = "mosaic_interpret" if context.dry else "mosaic"
    first = Pass(shape, variant=family.variant, direction=family.direction, implementation=implementation)
    search, faults = context.search(), []
    inputs = search.inputs(first)
    for mode in MODES[:1] if context.dry else MODES:  # the interpreter is slow
        one, taken = dataclasses.replace(first, mode=mode), set[Tile]()

        def choose(problem: Problem, present: Card, taken: set[Tile] = taken) -> Tile | None:
            of_family = [tile for tile in plans.candidates(problem, present) if family.takes(problem, tile)]
            if not of_family:
                return None
            taken.add(best := min(of_family, key=lambda tile: estimate.seconds(problem, tile, present)))
            return best

        arguments = one.arguments(inputs, choose)
        program = one.compiled(arguments, choose)
        found = program(*arguments)
        verdict = one.judge(found, one.right_results(inputs))
        runs = 1 if context.dry else 2 if small else RUNS
        differ = any(gate.differ(program, arguments, found) for _ in range(runs - 1))
        status = "WRONG" if not verdict.passed else "DIFFERS" if differ else "right" if taken else "NOT TAKEN"
        faults += [f"{mode}: {status} {verdict.reason}"] if status != "right" else []
        row = {"kind": "family", "family": name} | one.columns() | {"status": status, "error": verdict.error}
        context.write(row | {"runs": runs, "tiles": sorted(map(str, taken)), "note": verdict.reason or None})
    if faults:
        raise RuntimeError("; ".join(faults))


def check_all_small(context: Context) -> None:
    """Checks small maps of all families in this process, for a sanitizer."""
    for name in FAMILIES:
        check(context, name, small=True)


def sanitize(context: Context, tool: str) -> None:
    """Runs `check_all_small` under a tool of compute-sanitizer, if the machine has it; writes a row.

    Raises:
        RuntimeError: the tool found something.
    """
    found, row = shutil.which("compute-sanitizer"), {"kind": "sanitizer", "tool": tool}
    if found is None or context.dry:
        context.write(row | {"status": "not run", "note": "dry" if found else "compute-sanitizer is not on the PATH"})
        return
    # One allocation for each array: a sanitizer sees no fault that stays within an allocator's pool.
    step = running.step_command("small", context.out, context.kept, commit=context.commit)
    command = [found, f"--tool={tool}", "--error-exitcode=9", *step]
    environment = {**running.environment(context.kept, dry=False), "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=running.ROOT)
    print(answer.stdout, answer.stderr, flush=True)
    says = [line.lstrip("= ") for line in answer.stdout.splitlines() if line.startswith("=========")]
    context.write(
        row | {"status": "right" if answer.returncode == 0 else "WRONG", "note": says[-1:], "first": says[:3]}
    )
    if answer.returncode:
        raise RuntimeError(f"{tool}: exit code {answer.returncode}")


def marked_files() -> list[str]:
    """Returns the test files with a test marked gpu: others import packages that the machine may lack."""
    files = sorted((running.ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(running.ROOT)) for file in files if "@pytest.mark.gpu" in file.read_text()]


def result_of(line: str) -> str | None:
    """Returns the result in a line of `pytest -v`; None for other lines, also for those of the summary."""
    # With xdist the result stands before the test's name, else after it.
    found = re.match(r"\[gw\d+\] \[ *\d+%\] (\w+) |tests/\S+::.* (\w+)(?: \(.*\))? +\[ *\d+%\]$", line.strip())
    return (found[1] or found[2]) if found else None


def run_tests(context: Context) -> None:
    """Runs the tests marked gpu; writes a row for each failure, and one with the counts.

    Raises:
        RuntimeError: a test failed or was skipped, or none ran.
    """
    command = running.python("pytest", *marked_files(), "-m", "gpu", "-p", "no:cacheprovider")
    command += ["--collect-only", "-q"] if context.dry else ["-v"]
    if not context.dry and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # most of their time is compilation
    counts: dict[str, int] = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
    process = subprocess.Popen(command, cwd=running.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    collected = 0
    for line in process.stdout:
        sys.stdout.write(line)
        collected += bool(re.match(r"tests/\S+::", line))
        result = result_of(line)
        if result in counts:
            counts[result] += 1
        if result in ("FAILED", "ERROR"):
            context.write({"kind": "test", "status": result, "test": line.strip()[:300]})
    code = process.wait()
    context.write({"kind": "tests", "status": code, "collected": collected, **counts})
    if code or (not collected if context.dry else counts["SKIPPED"] or not counts["PASSED"]):
        raise RuntimeError(f"tests marked gpu: exit code {code}, {counts}")
