"""The rules of the layout: who may import whom, what is imported late, what files are called and how long they are."""

import ast
import dataclasses
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "gspn_jax", "configs", "experiments")
MODELS = ("gspn_jax.models", "gspn_jax.mixers", "gspn_jax.weights", "pallas_kernels")
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "base", "v2"}
LONGEST_FILE = 350

# These join the parts below them: the parts never import them.
FRONT = ("gspn_jax.runs", "gspn_jax.sampling")
GROUPS = ("experiments.benchmarks", "experiments.compiled", "experiments.figures", "experiments.ablations")

# Folder: modules that its files never import, except those that EXCEPT names for a file or folder below.
FORBIDDEN = {
    "pallas_kernels": ("gspn_jax", "experiments", "configs", "tests"),
    "gspn_jax": ("experiments", "configs", "tests", "ml_collections"),
    "gspn_jax/data": (*FRONT, *MODELS, "gspn_jax.training", "gspn_jax.diffusion", "gspn_jax.evaluation", "jax"),
    "gspn_jax/diffusion": (*FRONT, *MODELS, "gspn_jax.data", "gspn_jax.training", "gspn_jax.evaluation"),
    "gspn_jax/evaluation": (*FRONT, "gspn_jax.data", "gspn_jax.training", "gspn_jax.weights"),
    "gspn_jax/mixers": (*FRONT, "gspn_jax.models", "gspn_jax.data", "gspn_jax.training", "gspn_jax.weights"),
    "gspn_jax/models": (*FRONT, "gspn_jax.data", "gspn_jax.training", "gspn_jax.weights"),
    "gspn_jax/training": (*FRONT, *MODELS, "gspn_jax.data", "gspn_jax.diffusion"),
    "gspn_jax/weights": FRONT,
    "configs": ("tests",),
    "experiments": ("tests", *GROUPS),
    "tests/pallas_kernels": ("experiments", "configs"),
}
EXCEPT = {
    "gspn_jax/data/encoding.py": ("jax",),  # the processes that read images import no JAX; this file they leave out
    "gspn_jax/training/tasks": ("gspn_jax.diffusion",),
    "experiments/benchmarks": ("experiments.benchmarks",),
    "experiments/compiled": ("experiments.compiled", "experiments.benchmarks"),
    "experiments/figures": ("experiments.figures", "experiments.benchmarks"),
    "experiments/ablations": ("experiments.ablations", "experiments.benchmarks"),
}
# Folder: all that its files import beside the standard library and themselves.
ALLOWED = {"pallas_kernels": ("jax", "numpy"), "configs": ("ml_collections",)}
# Not in the lock: only inside functions of the packages, and only under this folder.
OPTIONAL = {"tensorflow": "gspn_jax/data", "torch": "tests/weights", "transformers": "experiments/benchmarks"}


@dataclasses.dataclass(frozen=True)
class Import:
    name: str  # dotted; for `from a import b` it is a.b, which may be a module or a thing in one
    line: int
    late: bool  # inside a function

    def within(self, module: str) -> bool:
        return self.name == module or self.name.startswith(module + ".")


def imports(source: str, package: tuple[str, ...]) -> Iterator[Import]:
    """All imports of a module that lies in `package`, those by a literal import_module included."""

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else ()
                module = ".".join((*above, *filter(None, [child.module])))
                names = [module if alias.name == "*" else f"{module}.{alias.name}" for alias in child.names]
            elif isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
                called = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                if called in ("import_module", "__import__") and isinstance(child.args[0].value, str):
                    names = [child.args[0].value]
            for name in names:
                yield Import(name, getattr(child, "lineno", 0), late)
            yield from walk(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(source), late=False)


def import_faults(path: str, found: Import) -> Iterator[str]:
    folders = [str(folder) for folder in Path(path).parents]
    excepted = [module for place in (path, *folders) for module in EXCEPT.get(place, ())]
    for folder in folders:
        for module in FORBIDDEN.get(folder, ()):
            if found.within(module) and module not in excepted:
                yield f"{folder} must not import {module}"
        top = found.name.split(".")[0]
        if folder in ALLOWED and top not in (folder, *ALLOWED[folder]) and top not in sys.stdlib_module_names:
            yield f"{folder} imports only {' and '.join(ALLOWED[folder])}, not {top}"
    for module, home in OPTIONAL.items():
        if found.within(module) and not found.late and "tests" not in folders:
            yield f"{module} is optional: import it inside the function that needs it"
        if found.within(module) and home not in folders:
            yield f"{module} is imported in {home} only"


def python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def layout_faults(root: Path) -> list[str]:
    """One line for each break of the rules in the tree below `root`."""
    faults = []
    for file in python_files(root, (*PACKAGES, "tests")):
        path = file.relative_to(root).as_posix()
        for found in imports(file.read_text(), Path(path).parent.parts):
            faults += [f"{path}:{found.line}: {fault}" for fault in import_faults(path, found)]
    for file in python_files(root, (*PACKAGES, "tests")):
        path = file.relative_to(root)
        vague = VAGUE.intersection(word for part in path.with_suffix("").parts for word in part.lower().split("_"))
        if vague:
            faults.append(f"{path.as_posix()}: {', '.join(sorted(vague))} says nothing about what is inside")
        length = len(file.read_text().splitlines())
        if length > LONGEST_FILE:
            faults.append(f"{path.as_posix()}: {length} lines, at most {LONGEST_FILE}")
    return faults


def module_graph(root: Path) -> dict[str, set[str]]:
    """Module: the other modules of the packages that it imports, also those that it imports inside a function."""
    files = {}
    for file in python_files(root, PACKAGES):
        name = file.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        files[name.removesuffix(".__init__")] = file

    def module_of(name: str) -> str | None:
        """`a.b.c` is the module of that name, or `c` in the module `a.b`."""
        return next((known for known in (name, name.rpartition(".")[0]) if known in files), None)

    graph = {}
    for name, file in files.items():
        found = imports(file.read_text(), file.relative_to(root).parent.parts)
        graph[name] = {module for each in found if (module := module_of(each.name)) and module != name}
    return graph


def import_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first again at the end; empty if none do."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))  # graphlib puts the imported module first
    return []


def test_no_modules_import_each_other_in_a_circle():
    graph = module_graph(REPOSITORY)
    assert "pallas_kernels.line_scan" in graph["pallas_kernels"] and len(graph) > 100
    assert import_circle(graph) == []


@pytest.mark.parametrize(
    "source, circle",
    [
        ("from gspn_jax.models import b", True),
        ("from gspn_jax.models.b import thing", True),
        ("import gspn_jax.models.b", True),
        ("from . import b", True),
        ("try:\n    from .b import thing\nexcept ImportError:\n    pass", True),
        ("def f():\n    from gspn_jax.models import b", True),
        ("from gspn_jax.models import layers", False),
    ],
)
def test_a_planted_circle_is_found(tmp_path, source, circle):
    plant(tmp_path, "gspn_jax/models/__init__.py", "from gspn_jax.models.a import thing")
    plant(tmp_path, "gspn_jax/models/a.py", source)
    plant(tmp_path, "gspn_jax/models/b.py", "from gspn_jax.models.layers import c\nimport gspn_jax.models.a")
    plant(tmp_path, "gspn_jax/models/layers.py", "import gspn_jax")
    found = import_circle(module_graph(tmp_path))
    assert set(found) == ({"gspn_jax.models.a", "gspn_jax.models.b"} if circle else set())


def test_layout_of_the_repository():
    assert {path.relative_to(REPOSITORY).parts[0] for path in python_files(REPOSITORY, PACKAGES)} == set(PACKAGES)
    faults = layout_faults(REPOSITORY)
    assert not faults, "\n" + "\n".join(faults)


def plant(root: Path, path: str, source: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


@pytest.mark.parametrize(
    "path, source, fault",
    [
        ("pallas_kernels/a.py", "import gspn_jax", "pallas_kernels must not import gspn_jax"),
        ("pallas_kernels/mosaic/a.py", "from ...gspn_jax import x", "imports only jax and numpy, not gspn_jax"),
        ("pallas_kernels/a.py", "def f():\n    import flax.nnx", "a.py:2: pallas_kernels imports only jax and numpy"),
        ("gspn_jax/models/a.py", "from experiments.train import main", "gspn_jax must not import experiments"),
        ("gspn_jax/models/a.py", "from configs import classifier", "gspn_jax must not import configs"),
        ("gspn_jax/training/a.py", "from ml_collections import ConfigDict", "must not import ml_collections"),
        ("gspn_jax/data/a.py", "from gspn_jax import models", "gspn_jax/data must not import gspn_jax.models"),
        ("gspn_jax/data/a.py", "from ..models import build", "gspn_jax/data must not import gspn_jax.models"),
        ("gspn_jax/data/a.py", "from .. import mixers", "gspn_jax/data must not import gspn_jax.mixers"),
        ("gspn_jax/training/a.py", "import gspn_jax.data.sources", "training must not import gspn_jax.data"),
        (
            "gspn_jax/training/a.py",
            "def f():\n    from gspn_jax.models import build",
            "must not import gspn_jax.models",
        ),
        ("gspn_jax/training/a.py", "importlib.import_module('gspn_jax.models')", "must not import gspn_jax.models"),
        ("gspn_jax/diffusion/a.py", "from gspn_jax.models import *", "diffusion must not import gspn_jax.models"),
        ("gspn_jax/mixers/a.py", "import gspn_jax.models.classifier", "mixers must not import gspn_jax.models"),
        ("gspn_jax/training/a.py", "from gspn_jax import diffusion", "training must not import gspn_jax.diffusion"),
        ("gspn_jax/training/tasks/a.py", "from gspn_jax import models", "training must not import gspn_jax.models"),
        ("gspn_jax/training/a.py", "from gspn_jax.runs import load_run", "training must not import gspn_jax.runs"),
        ("gspn_jax/models/a.py", "from gspn_jax import weights", "models must not import gspn_jax.weights"),
        ("gspn_jax/data/a.py", "import jax.numpy as jnp", "gspn_jax/data must not import jax"),
        ("configs/a.py", "import jax", "configs imports only ml_collections, not jax"),
        ("experiments/a.py", "from tests.tolerances import rms_ratio", "experiments must not import tests"),
        ("experiments/a.py", "from experiments.benchmarks import shapes", "must not import experiments.benchmarks"),
        ("experiments/benchmarks/a.py", "from experiments.compiled import b", "must not import experiments.compiled"),
        ("experiments/compiled/a.py", "import experiments.figures.b", "must not import experiments.figures"),
        ("tests/pallas_kernels/a.py", "from experiments import train", "pallas_kernels must not import experiments"),
        ("gspn_jax/data/a.py", "import tensorflow as tf", "tensorflow is optional"),
        ("gspn_jax/data/a.py", "try:\n    import tensorflow\nexcept ImportError:\n    pass", "a.py:2: tensorflow"),
        ("experiments/a.py", "def f():\n    import tensorflow as tf", "imported in gspn_jax/data only"),
        ("gspn_jax/models/a.py", "def f():\n    import torch", "torch is imported in tests/weights only"),
        ("gspn_jax/training/utils.py", "", "utils says nothing"),
        ("gspn_jax/models/common/a.py", "", "common says nothing"),
        ("tests/data/test_misc.py", "", "misc says nothing"),
        ("pallas_kernels/line_scan_v2.py", "", "v2 says nothing"),
        ("experiments/a.py", "x = 1\n" * (LONGEST_FILE + 1), f"{LONGEST_FILE + 1} lines"),
    ],
)
def test_a_planted_break_is_found(tmp_path, path, source, fault):
    plant(tmp_path, path, source)
    faults = layout_faults(tmp_path)
    assert any(line.startswith(path) and fault in line for line in faults), faults


def test_what_the_rules_allow_is_not_reported(tmp_path):
    plant(tmp_path, "pallas_kernels/a.py", "import dataclasses\nimport jax.numpy\nfrom . import b\nimport numpy as np")
    plant(tmp_path, "gspn_jax/models/a.py", "from gspn_jax.mixers import x\nfrom pallas_kernels import propagate")
    plant(tmp_path, "gspn_jax/data/a.py", "def f():\n    import tensorflow as tf\n    return tf")
    plant(tmp_path, "tests/weights/a.py", "import torch")
    plant(tmp_path, "gspn_jax/training/a.py", "import gspn_jax.training.state\nfrom . import checkpoint\nimport orbax")
    plant(tmp_path, "configs/a.py", "import ml_collections\nfrom ml_collections import config_dict")
    plant(tmp_path, "experiments/a.py", "import configs\nimport gspn_jax.models\nimport ml_collections\nimport grain")
    plant(tmp_path, "gspn_jax/training/tasks/a.py", "from gspn_jax import diffusion\nfrom gspn_jax import folder_lock")
    plant(tmp_path, "gspn_jax/runs.py", "from gspn_jax import data, models, training, weights")
    plant(
        tmp_path,
        "experiments/compiled/a.py",
        "from experiments.benchmarks import shapes\nfrom experiments import train",
    )
    plant(tmp_path, "tests/pallas_kernels/a.py", "from tests.tolerances import x\nimport pallas_kernels")
    plant(tmp_path, "gspn_jax/models/baseline.py", "x = 1\n" * LONGEST_FILE)
    assert layout_faults(tmp_path) == []
