"""The requirements files agree with the lock, with pyproject.toml and with what the code imports."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_layout import OPTIONAL, PACKAGES, REPOSITORY, imports, python_files

LOCK = (REPOSITORY / "requirements.lock").read_text()
GPU_LOCK = (REPOSITORY / "requirements-gpu.lock").read_text()
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[a-z0-9]+\])?==([A-Za-z0-9.]+)$")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Distribution: version, of a requirements file in which every line must be a pin."""
    found = {}
    for line in path.read_text().splitlines():
        requirement = line.split("#")[0].strip()
        if requirement:
            match = PIN.match(requirement)
            assert match, f"{path.name}: {requirement!r} is not of the form name==version"
            found[canonical(match[1])] = match[2]
    return found


def locked(lock: str = LOCK) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==([A-Za-z0-9.]+)", lock, re.MULTILINE))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_lock_holds_the_pins(name):
    direct = pins(REPOSITORY / name)
    assert direct and {key: locked().get(key) for key in direct} == direct


@pytest.mark.parametrize(
    "name", ["requirements-gpu.txt", "requirements-gpu-compile.txt", "requirements-tensorflow.txt"]
)
def test_extras_do_not_contradict_the_lock(name):
    extra = pins(REPOSITORY / name)
    assert extra and {key: locked()[key] for key in extra if key in locked()}.items() <= extra.items()


@pytest.mark.parametrize("lock,least", [(LOCK, 50), (GPU_LOCK, 15)], ids=["cpu", "gpu"])
def test_every_entry_of_a_lock_is_hashed_and_no_address_is_in_it(lock, least):
    entries = re.split(r"^(?=\S)", lock, flags=re.MULTILINE)[1:]
    assert len(entries) == len(locked(lock)) > least
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    assert not re.search(r"://|--(extra-)?index|--find-links|@ ", lock)


def test_gpu_lock_comes_on_top_of_the_lock():
    gpu = locked(GPU_LOCK)
    assert not set(gpu) & set(locked())
    assert gpu["jax-cuda13-plugin"] == gpu["jax-cuda13-pjrt"] == locked()["jax"]
    compile_only = pins(REPOSITORY / "requirements-gpu-compile.txt")
    assert {name: gpu[name] for name in compile_only if name in gpu}.items() <= compile_only.items()


def test_pyproject_offers_every_extra():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]
    files = [*dynamic["dependencies"]["file"]]
    for extra in dynamic["optional-dependencies"].values():
        files += extra["file"]
    assert sorted(files) == sorted(path.name for path in REPOSITORY.glob("requirements*.txt"))


def test_what_the_code_imports_is_declared():
    """A package that only comes along with another may leave with the next release of that other one."""
    distributions = importlib.metadata.packages_distributions()
    runtime = pins(REPOSITORY / "requirements.txt")
    development = runtime | pins(REPOSITORY / "requirements-dev.txt")
    undeclared = []
    for folders, declared in ((PACKAGES, runtime), (("tests",), development)):
        for file in python_files(REPOSITORY, folders):
            path = file.relative_to(REPOSITORY)
            for found in imports(file.read_text(), path.parent.parts):
                top = found.name.split(".")[0]
                if top in sys.stdlib_module_names or top in (*PACKAGES, "tests", *OPTIONAL):
                    continue
                if not any(canonical(name) in declared for name in distributions.get(top, [])):
                    undeclared.append(f"{path}:{found.line}: {top}")
    assert not undeclared, "\n" + "\n".join(undeclared)
