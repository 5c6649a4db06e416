"""The command for the first half hour on a card: its steps, and all of it in a dry run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.benchmarks.first_card import __main__ as first_card
from experiments.benchmarks.first_card import plan, refit, running, step
from experiments.benchmarks.first_card.context import Context
from experiments.benchmarks.first_card.correctness import marked_files, result_of
from experiments.benchmarks.first_card.plan import Step
from experiments.benchmarks.first_card.summary import MOST_CHARACTERS, summary
from experiments.benchmarks.shapes import select
from pallas_kernels.mosaic import card, estimate
from pallas_kernels.mosaic.tiles import Problem, Tile
from tests.test_layout import REPOSITORY

# What a borrowed machine lacks.
HIDE = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("ml_collections", "grain", "tensorboardX", "xdist", "orbax", "tensorflow_datasets"):
            raise ModuleNotFoundError(f"hidden: {name}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def run(tmp_path: Path, scripts: dict[str, str], *steps: Step, seconds: float = 60.0) -> dict[str, str]:
    """Runs steps whose work is a shell script, and returns their outcomes by name."""
    outcomes: list[running.Row] = []

    def command(step: Step) -> list[str]:
        return ["sh", "-c", scripts[step.work]]

    running.Runner(tmp_path, command, dict(os.environ), seconds, outcomes).run(1, steps)
    assert [row["step"] for row in running.read(tmp_path / running.RESULTS)] == [row["step"] for row in outcomes]
    return {row["step"]: row["status"] for row in outcomes}


def test_a_hanging_step_costs_only_itself_and_its_children_end_with_it(tmp_path):
    child = tmp_path / "child"
    scripts = {"hangs": f"sleep 600 & echo $! > {child}; wait", "fails": "exit 3", "works": "echo fine"}
    found = run(tmp_path, scripts, Step("hangs", seconds=1), Step("fails"), Step("works"))
    assert found == {"hangs": "timed out", "fails": "failed", "works": "done"}
    assert "fine" in (tmp_path / running.LOG).read_text()
    status = Path(f"/proc/{int(child.read_text())}/stat")
    for _ in range(100):  # until the system has ended it
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of a killed step lives on")


def test_steps_beside_others_are_waited_for_and_late_ones_are_named(tmp_path):
    scripts = {"beside": f"while [ ! -e {tmp_path}/file ]; do sleep 0.05; done", "works": f"touch {tmp_path}/file"}
    assert run(tmp_path, scripts, Step("beside", beside=True), Step("works")) == {"works": "done", "beside": "done"}
    (tmp_path / "late").mkdir()
    assert run(tmp_path / "late", {}, Step("late", "a"), seconds=0) == {"late a": "not reached"}


def test_results_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    running.append(path, {"a": 1})
    path.write_text(path.read_text() + '{"b": ')
    assert running.read(path) == [{"a": 1}]


def test_a_wrong_platform_is_an_error_and_so_is_a_machine_without_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "argv", ["first_card", "--part=1", f"--out={tmp_path}"])
    with pytest.raises(SystemExit, match="JAX_PLATFORMS: expected cuda,cpu or none, got cpu"):
        first_card.main()
    with pytest.raises(RuntimeError, match="no card for the kernels: JAX runs on the cpu"):
        Context("facts", tmp_path, tmp_path).require_card()


def test_the_plan_names_what_exists_and_a_dry_run_has_a_step_of_each_kind():
    for part in plan.PARTS:
        real, dry = plan.steps(part), plan.steps(part, dry=True)
        assert {one.work for one in real} == {one.work for one in dry} <= set(step.WORK)
        shapes = [one.of for one in real if one.work in ("variants", "tiles", "scans")]
        assert len(select(shapes)) == len(shapes)
    assert [one.of for one in plan.steps(1, dry=True) if one.work == "family"] == list(plan.FAMILIES)


def test_rates_are_found_again_from_times_that_they_explain():
    problem = Problem("forward", 2, 64, 64, 640, 64, 4, (2, 6, 2), (2,))
    present, tile = card.H200, Tile(16, 64)
    launches = [
        [(dataclasses.replace(problem, batch=batch, channels=channels), dataclasses.replace(tile, channels=width))]
        for batch in (2, 32, 128) for channels in (64, 640) for width in (8, 16, 32)
    ]  # fmt: skip
    truth = dataclasses.asdict(estimate.rates(present))
    truth = truth | {"bandwidth": truth["bandwidth"] / 2, "launch": 2 * truth["launch"]}
    times = [(one, refit.predicted(one, truth, present)) for one in launches]
    before = refit.typical_factor(times, dataclasses.asdict(estimate.rates(present)), present)
    found = refit.fit(times, present)
    assert refit.typical_factor(times, found, present) < min(1.1, before)
    assert refit.kernel_milliseconds({"milliseconds": 3.0, "parts": {"scan_forward": 1.0, "fusion": 2.0}}) == 1.0
    assert refit.kernel_milliseconds({"milliseconds": 3.0}) == 3.0


def test_the_summary_names_each_step_and_stays_short():
    outcomes = [{"kind": "step", "part": 1, "step": f"step {n}", "status": "done", "seconds": 1.0} for n in range(900)]
    timed = {"kind": "time", "step": "step 0", "variant": "low_rank", "mode": "backward", "implementation": "mosaic"}
    text = summary(outcomes, [timed | {"status": "timed", "milliseconds": 0.5}])
    assert "DONE part 1 step 0, 1 s\n  low_rank backward: timed 0.5\n" in text
    assert "step 899" in text and len(text) <= MOST_CHARACTERS


def test_results_in_the_lines_of_pytest():
    assert result_of("tests/a/test_b.py::test_c[1-two] PASSED                [ 10%]\n") == "PASSED"
    assert result_of("tests/a/test_b.py::test_c SKIPPED (no NVIDIA GPU visible)  [100%]\n") == "SKIPPED"
    assert result_of("[gw3] [ 52%] FAILED tests/a/test_b.py::test_c[1-two] \n") == "FAILED"
    assert result_of("FAILED tests/a/test_b.py::test_c - assert 1 == 2\n") is None
    assert result_of("tests/a/test_b.py::test_c[1-two] \n") is None


@pytest.mark.full
def test_a_machine_without_some_packages_imports_the_steps_and_collects_the_tests():
    modules = sorted({work.split(".")[0] for work in step.WORK.values()})
    imported = [f"experiments.benchmarks.first_card.{name}" for name in ("__main__", "context", *modules)]
    collects = f"import pytest; sys.exit(pytest.main(['-q', '--collect-only', '-m', 'gpu', *{marked_files()}]))"
    code = f"{HIDE}\nimport {', '.join(imported)}\n{collects}"
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    assert re.search(r"test_on_card.py::test_covering_cases", answer.stdout)


@pytest.mark.full
def test_a_dry_run_of_the_whole(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["first_card", "--dry", f"--out={out}", f"--kept={tmp_path}/kept", "--commit=c"])
    first_card.main()
    rows = running.read(out / running.RESULTS)
    outcomes = {row["step"]: row["status"] for row in rows if row["kind"] == "step"}
    assert set(outcomes.values()) == {"done"} and len(outcomes) == sum(len(plan.steps(n, dry=True)) for n in plan.PARTS)
    assert {row["status"] for row in rows if row["kind"] == "family"} == {"right"}
    assert {row["kind"] for row in rows} >= {
        "facts",
        "time",
        "lines",
        "launches",
        "attention",
        "train",
        "tests",
        "rates",
    }
    table = json.loads((out / "dry.json").read_text())
    assert table["about"]["commit"] == "c" and table["rates"] and table["tiles"] and table["propagations"]
    assert "sanitizer" in capsys.readouterr().out and len(list(out.iterdir())) <= 8
