"""Runs a command in the tests' own process."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from absl import flags

from experiments import command_line

DEFINES = {name: getattr(flags, name) for name in dir(flags) if name.startswith("DEFINE_")}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function (module, words of the command line) that runs the module's `main` with flags of its own."""

    def run(module: Any, *words: str) -> None:
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(command_line, "FLAGS", values)
        for name, define in DEFINES.items():
            monkeypatch.setattr(flags, name, functools.partial(define, flag_values=values))
        module.define_flags()
        values([module.__name__, *words])
        module.main()

    return run
