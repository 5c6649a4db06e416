"""Runs: what joins descriptions, models, tasks and parameters.

A description (`RunDescription`) says what a run is; `new_run` and `load_run` make a `Run` of it, which training,
evaluation and sampling ask for everything that depends on the task. To add a task, write a subclass of `Run` in a file
beside these, and add it to `RUNS`.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gspn_jax.runs.classification import ClassifierRun
from gspn_jax.runs.description import RunDescription, upgraded
from gspn_jax.runs.generation import GeneratorRun
from gspn_jax.runs.run import Run, differences, make_evaluate
from gspn_jax.training.checkpoints import Checkpoints, load_both
from gspn_jax.training.state import Parameters
from gspn_jax.training.transfer import fit

__all__ = [
    "RUNS",
    "ClassifierRun",
    "GeneratorRun",
    "Run",
    "RunDescription",
    "differences",
    "load_run",
    "make_evaluate",
    "new_run",
    "start_from",
]

RUNS: dict[str, type[Run]] = {run.task_name: run for run in (ClassifierRun, GeneratorRun)}


def new_run(description: Mapping[str, Any], weights: Mapping[str, Parameters] | None = None, **loaded: Any) -> Run:
    """Returns the run of a description; ValueError for a task that is not known.

    Args:
        description: of this version or of 0.1.
        weights, loaded: see `Run`.
    """
    described = upgraded(description)
    return _class_of(described["task"])(described, weights, **loaded)


def _class_of(task: str) -> type[Run]:
    if task not in RUNS:
        raise ValueError(f"task: expected one of {', '.join(RUNS)}; got {task!r}")
    return RUNS[task]


def load_run(
    folder: str | os.PathLike[str], *, step: int | None = None, parameters: str = "ema", task: str | None = None
) -> Any:
    """Loads a workdir, trained here or converted.

    Args:
        folder: the workdir.
        step: of the checkpoint; None for the newest good one.
        parameters: "ema" for the moving average, where the run keeps one, or "raw".
        task: "classification" or "generation", to refuse a run of another task; None takes any.

    Returns:
        A `ClassifierRun` (with `predict`) or a `GeneratorRun` (with `sample`); both have `model`, `description`,
        `class_names`, `step` and `preprocess`.

    Raises:
        ValueError: an argument out of range, a run of another task, or parameters that are not finite.
        CheckpointError: no good checkpoint.
    """
    if parameters not in ("ema", "raw"):
        raise ValueError(f"parameters: expected ema or raw, got {parameters!r}")
    raw, average, found = load_both(folder, step)
    described = upgraded({key: value for key, value in found.items() if key not in ("step", "ema")})
    if task is not None and described["task"] != task:
        raise ValueError(f"workdir: expected a run of {task}, got one of {described['task']}: {folder}")
    weights = {"raw": raw} | ({} if average is None else {"ema": average})
    chosen = parameters if parameters in weights else "raw"
    return new_run(described, weights, parameters=chosen, workdir=str(folder), step=found["step"])


def start_from(path: str, target: Run) -> Callable[[Parameters], Mapping[str, np.ndarray]]:
    """Returns abstract parameters -> the arrays of another run that fit them; prints what does not fit.

    Args:
        path: workdir of a run or of converted weights.
        target: the run that starts.

    Raises:
        ValueError: `path` is a file of weights, or holds a run of another task.
        CheckpointError: `path` holds no checkpoint.
    """
    if path.endswith((".safetensors", ".pth", ".pt")):
        raise ValueError(f"init_from: expected a workdir, got {path}; python -m experiments.convert makes one of it")
    Checkpoints(path, read_only=True).close()  # a wrong path shows before anything is compiled

    def initial(abstract: Parameters) -> Mapping[str, np.ndarray]:
        source = load_run(path)
        if source.task_name != target.task_name:
            raise ValueError(f"init_from: expected a run of {target.task_name}, got one of {source.task_name}: {path}")
        transfer = fit(source.params, abstract)
        if jax.process_index() == 0:
            kind = "moving average" if source.parameters == "ema" else "parameters"
            print(f"from {path}, step {source.step}, {kind}:", *transfer.report(), sep="\n")
            for line in differences(source, target):
                print(f"  differs: {line}")
        return transfer.loaded

    return initial
