"""Says where a result comes from: command, commit, date, hardware, versions, and the hash of parameters."""

import datetime
import os
import pathlib
import platform
import re
import subprocess
import sys

import jax

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def stamp() -> dict[str, str]:
    """Returns command, commit, date, hardware and jax's version, to be written beside a result.

    The command shows only the last part of absolute paths.
    """
    return {
        "command": command(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(),
        "jax": jax.__version__,
    }


def command() -> str:
    """Returns the command line of this process, with only the last part of absolute paths."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else pathlib.Path(sys.argv[0]).stem
    arguments = [re.sub(r"(^|(?<=[=,]))/[^,]*/(?=[^/,])", "", argument) for argument in sys.argv[1:]]
    return " ".join([f"python -m {name}", *arguments])


def commit() -> str:
    """Returns the short hash of the commit, or "uncommitted" where files outside of results differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        differs = git("status", "--porcelain", "--", ":/", ":(exclude,top)experiments/results")
        return "uncommitted" if differs else git("rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "uncommitted"


def hardware() -> str:
    """Returns the accelerators that JAX computes on, or the processor and its number of cores."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
