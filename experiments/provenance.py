"""Where a measured number comes from: the commit, the processor, the parameters."""

import hashlib
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax
import numpy as np


def commit() -> str:
    """Short hash of the commit; "uncommitted" where files other than results differ from it or there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return (
            "uncommitted"
            if git("status", "--porcelain", "--", ":/", ":(exclude,top)experiments/results")
            else git("rev-parse", "--short", "HEAD")
        )
    except (OSError, subprocess.CalledProcessError):
        return "uncommitted"


def sha256_of_arrays(tree: Any) -> str:
    """Of all bytes of a tree of host arrays, in order."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(leaf))
    return total.hexdigest()


def processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def hardware() -> str:
    """The accelerators that JAX computes on, or the processor and its cores."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    return f"{processor()}, {os.cpu_count()} cores"
