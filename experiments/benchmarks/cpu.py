"""Images per second of training and inference on a CPU, in turns with an older commit and with PyTorch's ConvNeXt-T.

    git worktree add OLD 6c3f906
    python3.11 -m venv PEER; PEER/bin/pip install torch==2.13.0 transformers
    python -m experiments.benchmarks.cpu --old=OLD --peer=PEER/bin/python --output=experiments/results/cpu.csv

Each step of a comparison is compiled in a process of its own. Then both run in turns, so that other programs on the
machine slow both. `images_per_s` is of the median run by the clock. `cpu_s` is the median of what all cores worked for.
`ratio` is this commit's images per second by the clock divided by the other's, and `cpu_ratio` the same by cpu_s. On a
machine that runs other programs cpu_ratio is the better figure between two commits; PyTorch's waiting threads count as
working, so compare with it on an idle machine only.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from experiments import command_line, provenance, tables
from experiments.benchmarks import cpu_steps

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Steps of this commit, and what each is compared with: itself in the older commit, or PyTorch's step.
AGAINST_OLD = ("digits_training", "cifar10_training", "mixer_training")
AGAINST_PEER = {"gspn_t_inference": "convnext_t_inference", "gspn_t_training": "convnext_t_training"}
COLUMNS = ("step", "program", "batch", "rounds", "images_per_s", "cpu_s", "ratio", "cpu_ratio", "load")


@contextlib.contextmanager
def started(name: str, python: str, folder: str | pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """Starts a step that imports gspn_jax from `folder`, and waits until it is compiled.

    Raises:
        RuntimeError: the process ended before that.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    # -P: files beside the script have names of packages that transformers looks for.
    command = [python, "-P", cpu_steps.__file__, name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line == "ready\n":
                    break
            else:
                raise RuntimeError(f"{name}: expected {python} in {folder} to compile it; the process ended")
            yield process
        finally:
            process.kill()


def in_turns(processes: Sequence[subprocess.Popen[str]], rounds: int) -> list[list[tuple[float, float]]]:
    """Returns (seconds by the clock, seconds of all cores) of each round, for each process."""
    times: list[list[tuple[float, float]]] = [[] for _ in processes]
    for _ in range(rounds):
        for process, found in zip(processes, times, strict=True):
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            wall, cpu = json.loads(process.stdout.readline())
            found.append((wall, cpu))
    return times


def compared(name: str, other: str, python: str, folder: str | pathlib.Path, rounds: int) -> list[dict[str, Any]]:
    """Returns the rows of step `name` of this commit and of `other`, which `python` runs in `folder`."""
    with started(name, sys.executable, ROOT) as mine, started(other, python, folder) as theirs:
        times = in_turns((mine, theirs), rounds)
    batch = cpu_steps.STEPS[name].batch
    (wall, cpu), (other_wall, other_cpu) = (
        [statistics.median(column) for column in zip(*t, strict=True)] for t in times
    )
    same = dict(step=name, batch=batch, rounds=rounds, load=round(os.getloadavg()[0], 1))
    programs = f"this commit, {provenance.commit()}", other if other != name else f"commit {_commit(folder)}"
    return [
        same | dict(program=programs[0], images_per_s=f"{batch / wall:.4g}", cpu_s=f"{cpu:.4g}")
        | dict(ratio=f"{other_wall / wall:.2f}", cpu_ratio=f"{other_cpu / cpu:.2f}"),
        same | dict(program=programs[1], images_per_s=f"{batch / other_wall:.4g}", cpu_s=f"{other_cpu:.4g}"),
    ]  # fmt: skip


def _commit(folder: str | pathlib.Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(old: str | None, peer: str | None, output: str | None, rounds: int) -> list[dict[str, Any]]:
    """Makes the comparisons for which a program is given, prints their rows, and writes them if `output` is a path."""
    pairs = [(name, name, sys.executable, old) for name in AGAINST_OLD] if old else []
    pairs += [(name, other, peer, ROOT) for name, other in AGAINST_PEER.items()] if peer else []
    rows = []
    for pair in pairs:
        rows += compared(*pair, rounds)
        for row in rows[-2:]:
            print(*(f"{key} {row[key]}" for key in COLUMNS if key in row), sep=", ", flush=True)
        if output:
            tables.write(output, rows, COLUMNS, provenance.stamp())
    return rows


def define_flags() -> None:
    flags.DEFINE_string("old", None, "Folder with a checkout of an older commit.")
    flags.DEFINE_string("peer", None, "Python that has torch and transformers.")
    flags.DEFINE_integer("rounds", 8, "Runs of each step.", lower_bound=1)
    flags.DEFINE_string("output", None, "CSV file to write.")


def main() -> None:
    chosen = flags.FLAGS
    if not (chosen.old or chosen.peer):
        raise ValueError("old, peer: expected at least one of them, got none")
    run(chosen.old, chosen.peer, chosen.output, chosen.rounds)


if __name__ == "__main__":
    command_line.start(main, define_flags)
