"""What there is on this machine, as `experiments.doctor` judges it: cards, versions, settings, room."""

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
    """An NVIDIA GPU as its driver reports it. Memory in MiB, before JAX took its own."""

    name: str
    used: float = 0.0
    total: float = 0.0
    driver: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """All that the checks look at."""

    python: tuple[int, int]
    environment: Mapping[str, str]
    installed: Mapping[str, str]  # distribution: version
    pinned: Mapping[str, str]
    cards: tuple[Card, ...]
    backend: str  # "" if none started
    backend_error: str
    free_disk: float  # GiB, of the folder that the command runs in
    x64: bool


def read_pins(path: Path) -> dict[str, str]:
    """Distribution: version, of the lines name==version of a requirements file."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {name: version for name, found, version in (line.partition("==") for line in lines) if found}


def installed_versions() -> dict[str, str]:
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {name.lower().replace("_", "-"): version for name, version in found.items() if name}


def find_cards(root: Path = Path("/")) -> tuple[Card, ...]:
    """The NVIDIA GPUs here, by nvidia-smi, or by the driver's own files below `root` where that is missing."""
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
    """Cards that share their memory with the CPU answer [N/A]."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def observe() -> Machine:
    """Looks at this machine. Starts JAX's backend, after the cards were asked for the memory that others hold."""
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
