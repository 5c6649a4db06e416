"""Runs: a run joins a description, a model, a task and parameters.

A description (`RunDescription`) defines a run; `new_run` and `load_run` build a `Run` from it. Training, evaluation and
sampling get everything that depends on the task from the `Run`. To add a task, write a subclass of `Run` in its own
file in this package, and add it to `RUNS`.
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
from gspn_jax.runs.text_to_image import TextToImageRun
from gspn_jax.training.checkpoints import Checkpoints, load_both
from gspn_jax.training.state import Parameters
from gspn_jax.training.transfer import fit

__all__ = [
    "RUNS",
    "ClassifierRun",
    "GeneratorRun",
    "Run",
    "RunDescription",
    "TextToImageRun",
    "differences",
    "load_run",
    "make_evaluate",
    "new_run",
    "start_from",
]

RUNS: dict[str, type[Run]] = {run.task_name: run for run in (ClassifierRun, GeneratorRun, TextToImageRun)}


def new_run(description: Mapping[str, Any], weights: Mapping[str, Parameters] | None = None, **loaded: Any) -> Run:
    """Builds the run that a description defines.

    Args:
        description: written by this version or by 0.1.
        weights, loaded: see `Run`.

    Raises:
        ValueError: an unknown task, or a network that the task cannot use.
    """
    described = upgraded(description)
    return _class_of(described["task"])(described, weights, **loaded)


def _class_of(task: str) -> type[Run]:
    """Returns the class of a task's runs; ValueError for an unknown task."""
    if task not in RUNS:
        raise ValueError(f"task: expected one of {', '.join(RUNS)}; got {task!r}")
    return RUNS[task]


def load_run(
    folder: str | os.PathLike[str], *, step: int | None = None, parameters: str = "ema", task: str | None = None
) -> Any:
    """Loads a workdir that training or conversion wrote.

    Args:
        folder: the workdir.
        step: step of the checkpoint; None takes the newest good one.
        parameters: "ema" for the moving average, or "raw". Without a moving average, "ema" loads "raw".
        task: "classification", "generation" or "text_to_image" refuses a run of another task; None accepts any.

    Returns:
        A `ClassifierRun` (with `predict`), a `GeneratorRun` or a `TextToImageRun` (with `sample`); all have `model`,
        `description`, `step` and `preprocess`.

    Raises:
        ValueError: an argument out of range, a run of another task, or parameters that are not finite.
        CheckpointError: the folder has no good checkpoint.
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
    """Returns the `initial` argument of `gspn_jax.training.train`, which starts from another run's parameters.

    Args:
        path: workdir of a run or of converted weights.
        target: the run that starts.

    Returns:
        Abstract parameters -> the arrays of the other run that fit them. The function prints the parameters that do
        not fit, and the settings in which the runs differ; it raises ValueError if their tasks differ.

    Raises:
        ValueError: `path` is a file of weights.
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
