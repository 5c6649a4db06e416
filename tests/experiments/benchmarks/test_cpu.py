import subprocess
import sys
from typing import Any

import pytest

from experiments.benchmarks import cpu, cpu_steps

# A step of no work: it answers each line as `cpu_steps.main` does, with its number of runs.
COUNTS = "import sys, json\nfor n, _ in enumerate(sys.stdin): print(json.dumps([n, 10 * n]), flush=True)"


def test_every_comparison_is_of_known_steps_with_equal_work():
    assert set(cpu.AGAINST_OLD) <= set(cpu_steps.STEPS)
    for mine, theirs in ((cpu_steps.STEPS[a], cpu_steps.STEPS[b]) for a, b in cpu.AGAINST_PEER.items()):
        assert mine[1:5] == theirs[1:5]


def test_processes_run_in_turns():
    pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, "-c", COUNTS], **pipes) for _ in range(2)]
    try:
        assert cpu.in_turns(processes, 3) == [[(0, 0), (1, 10), (2, 20)]] * 2
    finally:
        for process in processes:
            process.communicate()


def test_a_step_that_does_not_start(tmp_path):
    with (
        pytest.raises(RuntimeError, match="digits: expected .* to compile it; the process ended"),
        cpu.started("digits", sys.executable, tmp_path),
    ):
        pass


@pytest.mark.full
@pytest.mark.parametrize("step", [
    cpu_steps.Step("gspn_nano", True, 1, 8, 10, {"depths": (1, 1, 1)}), cpu_steps.Step("mixer", True, 1, 2),
])  # fmt: skip
def test_steps_run(step):
    cpu_steps.prepare(step)()
