"""Collects the facts about this machine that `experiments.doctor` checks: cards, versions, settings, free disk."""

import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"


@dataclasses.dataclass(frozen=True)
class Card:
    """An NVIDIA GPU, as its driver reports it.

    Attributes:
        name: name of the product.
        used: memory that processes hold, in MiB, before JAX starts.
        total: memory of the card in MiB; 0 if unknown.
        driver: version of the driver, "" if unknown.
    """

    name: str
    used: float = 0.0
    total: float = 0.0
    driver: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The facts that the checks read.

    Attributes:
        python: version of Python.
        environment: environment variables.
        installed: version of each installed distribution.
        pinned: version of each distribution that requirements.txt pins.
        cards: NVIDIA GPUs.
        backend: JAX's backend, "" if none started.
        backend_error: the error of a backend that did not start.
        free_disk: free room in the working folder, in GiB.
        x64: whether jax_enable_x64 is on.
    """

    python: tuple[int, int]
    environment: Mapping[str, str]
    installed: Mapping[str, str]
    pinned: Mapping[str, str]
    cards: tuple[Card, ...]
    backend: str
    backend_error: str
    free_disk: float
    x64: bool


def read_pins(path: Path) -> dict[str, str]:
    """Returns {distribution: version} from the lines name==version of a requirements file."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {name: version for name, found, version in (line.partition("==") for line in lines) if found}


def installed_versions() -> dict[str, str]:
    """Returns {distribution: version} of this Python, with names in lower case and hyphens."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {name.lower().replace("_", "-"): version for name, version in found.items() if name}


def find_cards(root: Path = Path("/")) -> tuple[Card, ...]:
    """Returns the NVIDIA GPUs that nvidia-smi lists or, without nvidia-smi, the driver's files below `root` show."""
    query = ["nvidia-smi", "--query-gpu=name,memory.used,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        answer = None
    if answer is not None and answer.returncode == 0:
        rows = [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines()]
        return tuple(Card(name, _number(used), _number(total), driver) for name, used, total, driver in rows)
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*")) or sorted((root / "dev").glob("nvidia[0-9]*"))
    return tuple(Card("NVIDIA GPU") for _ in files)


def _number(text: str) -> float:
    """Returns a number of nvidia-smi, or 0 for [N/A], the answer of cards that share their memory with the CPU."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def observe() -> Machine:
    """Collects the facts; starts JAX's backend after it has read the memory that other processes hold."""
    cards = find_cards()
    backend, error = "", ""
    try:
        backend = jax.default_backend()
    except RuntimeError as failure:
        error = str(failure)
    return Machine(
        python=sys.version_info[:2],
        environment=dict(os.environ),
        installed=installed_versions(),
        pinned=read_pins(REQUIREMENTS) if REQUIREMENTS.exists() else {},
        cards=cards,
        backend=backend,
        backend_error=error,
        free_disk=shutil.disk_usage(".").free / 2**30,
        x64=jax.config.jax_enable_x64,
    )
