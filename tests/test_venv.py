"""`.ci/venv` with a stand-in Python and a stand-in nvidia-smi: the packages that it would install."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_layout import REPOSITORY

# Plays Python 3.12: a virtual environment is a copy of itself, and pip writes down its arguments.
PYTHON = """#!/bin/sh
case "$*" in
    "-c import ensurepip"*) exit 0 ;;
    "-c import sys"*) echo "$0" ;;
    --version) echo "Python 3.12.0" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && : >"$3/pyvenv.cfg" && echo "venv $3" >>"$RECORD" ;;
    "-m pip install "*) shift 3; echo "install $*" >>"$RECORD"; exit "${PIP_FAILS:-0}" ;;
esac
"""
OPTIONS = "--require-hashes --disable-pip-version-check --no-input"
MAKES = "venv .venv"
LIBRARIES = f"install {OPTIONS} -r requirements.lock"
GPU_PACKAGES = f"install {OPTIONS} --no-deps -r requirements-gpu.lock"


class Checkout:
    """A folder with two locks, the script, and a PATH on which only the stand-ins and the system's own tools are."""

    def __init__(self, folder: Path):
        self.folder, self.tools = folder, folder / "tools"
        self.tools.mkdir()
        for name in ("sh", "cmp", "cp", "grep", "mkdir", "rm"):
            (self.tools / name).symlink_to(shutil.which(name) or name)
        self.program("python3", PYTHON)
        (folder / "requirements.lock").write_text("jax==1.0\n")
        (folder / "requirements-gpu.lock").write_text("jax-cuda==1.0\n")

    def program(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def make(self, **environment: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
        """(environments made and files installed, in order; the finished process)."""
        record = self.folder / "record"
        record.write_text("")
        finished = subprocess.run(
            [str(REPOSITORY / ".ci" / "venv"), ".venv"],
            cwd=self.folder,
            env={"PATH": str(self.tools), "RECORD": str(record), **environment},
            capture_output=True,
            text=True,
        )
        return record.read_text().splitlines(), finished

    def made(self, **environment: str) -> list[str]:
        record, finished = self.make(**environment)
        assert finished.returncode == 0, finished.stderr
        return record


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def with_driver(checkout: Checkout) -> None:
    checkout.program("nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI'\n")


def test_without_a_driver_only_the_lock_is_installed_and_only_once(checkout):
    assert checkout.made() == [MAKES, LIBRARIES]
    assert checkout.made() == []


def test_with_a_driver_the_gpu_packages_are_installed_too(checkout):
    with_driver(checkout)
    assert checkout.made() == [MAKES, LIBRARIES, GPU_PACKAGES]
    assert checkout.made() == []


def test_a_driver_that_does_not_answer_is_none(checkout):
    checkout.program("nvidia-smi", "#!/bin/sh\necho 'cannot talk to the driver' >&2\nexit 9\n")
    assert checkout.made() == [MAKES, LIBRARIES]


def test_a_variable_decides_against_the_driver(checkout):
    with_driver(checkout)
    assert checkout.made(GPU="0") == [MAKES, LIBRARIES]
    assert checkout.made(GPU="0") == []
    assert checkout.made() == [LIBRARIES, GPU_PACKAGES]


def test_a_variable_decides_without_a_driver(checkout):
    assert checkout.made(GPU="1") == [MAKES, LIBRARIES, GPU_PACKAGES]
    assert checkout.made() == []  # the packages stay where no driver answers


def test_gpu_packages_leave_with_the_environment_that_holds_them(checkout):
    with_driver(checkout)
    checkout.made()
    (checkout.folder / ".venv" / "old").touch()
    assert checkout.made(GPU="0") == [MAKES, LIBRARIES]
    assert not (checkout.folder / ".venv" / "old").exists()


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-gpu.lock"])
def test_another_lock_is_installed_into_the_same_environment(checkout, lock):
    with_driver(checkout)
    checkout.made()
    (checkout.folder / lock).write_text("jax==2.0\n")
    assert checkout.made() == [LIBRARIES, GPU_PACKAGES]
    assert checkout.made() == []


def test_an_installation_that_failed_is_made_again(checkout):
    _, finished = checkout.make(PIP_FAILS="1")
    assert finished.returncode == 1 and (checkout.folder / ".venv" / ".unfinished").exists()
    assert checkout.made() == [MAKES, LIBRARIES]


def test_another_value_of_the_variable_is_refused(checkout):
    record, finished = checkout.make(GPU="yes")
    assert finished.returncode == 1 and record == []
    assert finished.stderr == "GPU: expected 0, 1 or auto, got yes\n"


def test_a_folder_that_is_no_environment_is_left_alone(checkout):
    kept = checkout.folder / ".venv" / "thesis.tex"
    kept.parent.mkdir()
    kept.touch()
    record, finished = checkout.make()
    assert finished.returncode == 1 and record == [] and kept.exists()


def test_make_passes_the_variable_on(tmp_path):
    """`make venv GPU=0` and `GPU=0 make venv` reach the script; by default it decides itself."""

    # The first is the question; the others come from a `make` that runs the tests.
    inherited = ("GPU", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")

    def asked(*arguments: str, **environment: str) -> str:
        command = ["make", "--dry-run", "-f", str(REPOSITORY / "Makefile"), "venv", *arguments]
        clean = {key: value for key, value in os.environ.items() if key not in inherited}
        return subprocess.run(
            command, cwd=tmp_path, env=clean | environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert asked() == 'GPU="auto" .ci/venv ".venv"'
    assert asked("GPU=0") == asked(GPU="0") == 'GPU="0" .ci/venv ".venv"'
