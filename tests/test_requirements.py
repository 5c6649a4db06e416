"""Requirements agree with the locks, with pyproject.toml and with the imports; the wheel holds the libraries only."""

import ast
import fnmatch
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_layout import OPTIONAL, PACKAGES, REPOSITORY, imports, python_files

LOCKS = ("requirements.lock", "requirements-gpu.lock")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
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


def locked(name: str = "requirements.lock") -> dict[str, str]:
    lock = (REPOSITORY / name).read_text()
    return dict(re.findall(r"^([a-z0-9-]+)(?:\[[a-z0-9,-]+\])?==([A-Za-z0-9.]+)", lock, re.MULTILINE))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_lock_holds_the_pins(name):
    direct = pins(REPOSITORY / name)
    assert direct and {key: locked().get(key) for key in direct} == direct


@pytest.mark.parametrize(
    "name", ["requirements-gpu.txt", "requirements-gpu-compile.txt", "requirements-tensorflow.txt"]
)
def test_extras_do_not_contradict_the_locks(name):
    extra, both = pins(REPOSITORY / name), {**locked("requirements.lock"), **locked("requirements-gpu.lock")}
    assert extra and {key: both[key] for key in extra if key in both}.items() <= extra.items()


def test_the_gpu_lock_comes_on_top_of_the_lock():
    libraries, gpu = (locked(name) for name in LOCKS)
    assert not libraries.keys() & gpu.keys()
    assert gpu["jax-cuda13-plugin"] == gpu["jax-cuda13-pjrt"] == libraries["jax"]
    assert pins(REPOSITORY / "requirements-gpu.txt") == {"jax": libraries["jax"]}


@pytest.mark.parametrize("name, least", [("requirements.lock", 50), ("requirements-gpu.lock", 15)])
def test_every_entry_of_a_lock_is_hashed_and_no_address_is_in_it(name, least):
    text = (REPOSITORY / name).read_text()
    entries = [entry for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if not entry.startswith("#")]
    entries = [entry for entry in entries if entry.strip()]
    assert len(entries) == len(locked(name)) > least
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    assert not re.search(r"://|--(extra-)?index|--find-links|@ ", text)


def test_pyproject_offers_every_extra():
    dynamic = SETUPTOOLS["dynamic"]
    files = [*dynamic["dependencies"]["file"]]
    for extra in dynamic["optional-dependencies"].values():
        files += extra["file"]
    assert sorted(files) == sorted(path.name for path in REPOSITORY.glob("requirements*.txt"))


def test_the_wheel_holds_the_libraries_and_their_tables_only():
    """Applies the patterns of pyproject.toml as setuptools does, which the lock does not hold."""
    assert not SETUPTOOLS["packages"]["find"]["namespaces"], "else folders without __init__.py count"
    packages = [path.parent.relative_to(REPOSITORY) for path in REPOSITORY.glob("[!.]*/**/__init__.py")]
    names = [".".join(path.parts) for path in packages]
    include = SETUPTOOLS["packages"]["find"]["include"]
    taken = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in include)}
    assert {name.split(".")[0] for name in taken} == {"gspn_jax", "pallas_kernels"}
    package_data = SETUPTOOLS["package-data"]
    for top in ("gspn_jax", "pallas_kernels"):
        for file in (REPOSITORY / top).rglob("*"):
            if file.is_dir() or "__pycache__" in file.parts:
                continue
            folder = next(folder for folder in file.parents if (folder / "__init__.py").exists())
            package = ".".join(folder.relative_to(REPOSITORY).parts)
            assert package in taken and (file.suffix != ".py" or folder == file.parent), f"{file}: in no package"
            name, patterns = file.relative_to(folder).as_posix(), package_data.get(package, ())
            is_taken = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            assert file.suffix == ".py" or is_taken, f"{file}: not in the package data of pyproject.toml"


def test_the_version_is_written_once():
    """pyproject.toml reads it from a module that imports nothing, and CITATION.cff and CHANGELOG.md name the same."""
    module, _, attribute = SETUPTOOLS["dynamic"]["version"]["attr"].rpartition(".")
    source = ast.parse((REPOSITORY / module.replace(".", "/")).with_suffix(".py").read_text())
    values = {ast.unparse(node.targets[0]): node.value for node in source.body if isinstance(node, ast.Assign)}
    version = ast.literal_eval(values[attribute])
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == version


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
