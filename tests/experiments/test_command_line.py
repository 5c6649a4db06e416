"""The command line: help, mistakes in flags, errors as one line."""

import os
import re
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from experiments import command_line

CONFIG = "configs/classifier.py:digits"


def define_flags() -> None:
    """Flags of the command below."""
    config_flags.DEFINE_config_file("config", CONFIG, "Configuration and preset.")
    flags.DEFINE_string("fails", "", "How to fail.")
    flags.DEFINE_integer("count", 3, "How many.", lower_bound=1)
    flags.DEFINE_string("output", None, "Where to.", required=True)


def main(words: Sequence[str] = ()) -> None:
    fails = flags.FLAGS.fails
    if fails == "memory":
        jax.block_until_ready(jnp.zeros((10**7, 10**8)))
    elif fails == "host":
        raise MemoryError
    elif fails == "run":
        raise RuntimeError("a library\nfailed")
    config = flags.FLAGS.config
    print(config.model.depths, config.steps, list(words))


def command(arguments: list[str], out: str, err: str, positional: str | None) -> None:
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["command", *arguments]
    command_line.start(main, define_flags, positional)


def run(folder: Path, *arguments: str, positional: str | None = None) -> tuple[int | None, str, str]:
    """Returns exit code and printed text of the command, which runs in a process of its own: flags are global."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.training.toy"])
    names = [str(folder / name) for name in ("out", "err")]
    process = context.Process(target=command, args=([*arguments], *names, positional))
    process.start()
    process.join(120)
    return process.exitcode, (folder / "out").read_text(), (folder / "err").read_text()


def test_help_shows_the_commands_own_flags_first_and_exits_0(tmp_path: Path):
    code, out, err = run(tmp_path, "--help", positional="IMAGE")
    assert (code, err) == (0, "") and out.startswith("The command line: help, mistakes in flags")
    assert "[FLAGS] IMAGE...\n" in out
    names = re.findall(r"^  --(?:\[no\])?([\w.]+)", out, re.M)
    shared = ["coordinator_address", "num_processes", "process_id", "traceback"]
    assert names == ["config", "config.KEY", "count", "fails", "output", *shared]
    assert "      How many. Default: 3." in out


def test_words_that_are_not_flags(tmp_path: Path):
    assert run(tmp_path, "--output=x", "a", "b", positional="IMAGE")[:2] == (0, "None 0 ['a', 'b']\n")
    assert run(tmp_path, "--output=x")[:2] == (0, "None 0 []\n")
    for words, positional, message in (
        (["a", "b"], None, "expected flags only, got a b"),
        ([], "IMAGE", "expected at least one IMAGE after the flags, got none"),
    ):
        code, _, err = run(tmp_path, "--output=x", *words, positional=positional)
        assert (code, err) == (1, f"error: {message}\n")


def test_of_repeated_keys_the_last_one_counts(tmp_path: Path):
    more = ["--config.steps=1", "--config.model.depths=(1,2)", "--config.model.depths=(3,)", "--config.steps=2"]
    assert run(tmp_path, "--output=x", *more)[1] == "(3,) 2 []\n"


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("memory", r"out of memory: try a smaller batch size; .*accumulate.*remat.*\(RESOURCE_EXHAUSTED: .*\)"),
        ("host", r"out of memory: try a smaller batch size; .* \(no memory left on the host\)"),
        ("run", "a library failed"),
    ],
)
def test_failures_are_one_line_and_exit_code_1(tmp_path: Path, fails: str, words: str):
    code, out, err = run(tmp_path, "--output=x", f"--fails={fails}")
    assert code == 1 and out == "" and re.fullmatch(f"error: {words}\n", err), err
    if fails == "run":
        code, _, err = run(tmp_path, "--output=x", "--fails=run", "--traceback")
        assert code == 1 and "Traceback (most recent call last)" in err and "a library\nfailed" in err


PRESET = f"--config={CONFIG}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--config=README.md"],
            "--config: expected a Python file such as configs/classifier.py:digits, got README.md",
        ),
        (["--config=configs/none.py"], "--config: expected a Python file such as .* got configs/none.py"),
        ([f"--config={CONFIG}x"], "preset: expected one of digits, .* got 'digitsx'"),
        (
            [PRESET, "--config.tasks=dance"],
            r"no such key in the configuration: --config.tasks=dance; did you mean task\?",
        ),
        (
            [PRESET, "--config.model.depths=(1,)", "--config.model.dept=1"],
            r"no such key in the configuration: --config.model.dept=1; did you mean depths\?",
        ),
        ([PRESET, "--config.data.name=npz", "--noconfig.mixing.name"], "no such key .*: --noconfig.mixing.name"),
        ([PRESET, "--config.steps.first=1"], "no such key .*: --config.steps.first=1"),
        ([PRESET, "--config.steps=x"], "flag --config.steps=x: invalid literal .*"),
        ([PRESET, "--config.model.depths", "1", "--config.model.depths", "2"], "--config.model.depths: given twice"),
        (["--count=0"], "flag --count=0: 0 is not a positive integer"),
        (["--confg=x"], "Unknown command line flag 'confg'. Did you mean: config .*"),
    ],
)
def test_mistakes_in_flags_are_named(tmp_path: Path, arguments: list[str], words: str):
    code, out, err = run(tmp_path, "--output=x", *arguments)
    assert (code, out) == (1, "") and re.fullmatch(f"error: {words}\n", err), err


def test_a_configuration_file_that_fails_is_named(tmp_path: Path):
    for text, words in (("import nothing_of_this_name\n", "ModuleNotFoundError"), ("x = 1\n", "AttributeError")):
        (tmp_path / "file.py").write_text(text)
        code, _, err = run(tmp_path, "--output=x", f"--config={tmp_path / 'file.py'}")
        assert code == 1 and re.fullmatch(f"error: --config: cannot run {tmp_path}/file.py: {words}: .*\n", err), err


def test_a_lost_process_is_named(monkeypatch: pytest.MonkeyPatch):
    reset = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: [pair.cc:538] Connection reset by peer")
    assert command_line.one_line(reset).startswith("UNKNOWN: Gloo")  # a run of one process has lost nobody
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    assert command_line.one_line(reset).startswith("lost another process of this run: see its own messages, then start")
    late = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out: /job:jax_worker/replica:0/task:1")
    wrapped = RuntimeError("cannot write checkpoint 5")
    wrapped.__cause__ = late
    assert command_line.one_line(wrapped).startswith("lost another process of this run (number 1): ")
    long = command_line.one_line(ValueError("x" * 5000))
    assert len(long) < 700 and " ... " in long


def test_integers_name_their_flag():
    assert command_line.integers("classes", ["1", "2"]) == (1, 2)
    with pytest.raises(ValueError, match="classes: expected integers, got 1,b"):
        command_line.integers("classes", ["1", "b"])
