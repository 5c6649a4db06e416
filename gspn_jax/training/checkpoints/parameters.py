"""Reading and writing the parameters of a run, without the state of its training."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gspn_jax.training.checkpoints import record as records
from gspn_jax.training.checkpoints.fingerprint import finite
from gspn_jax.training.checkpoints.folder import CheckpointError, Checkpoints
from gspn_jax.training.state import Parameters


def load_parameters(
    workdir: str | os.PathLike[str], step: int | None = None, ema: bool = True
) -> tuple[Parameters, dict[str, Any]]:
    """Returns parameters as host arrays, and the description of the run.

    Args:
        workdir: folder of a training run, or one that `save_parameters` made.
        step: step of the checkpoint; None: the newest good one.
        ema: return the moving average instead of the parameters, if the run keeps one.

    Returns:
        A nested dict of arrays, and the description with two keys added: "step", and "ema", which says whether the
        arrays are the moving average.

    Raises:
        CheckpointError: no checkpoint is good. Arrays with NaN or Inf are not good.
    """
    items, description = _load(workdir, step)
    ema = ema and "ema" in items
    return _on_host(items["ema" if ema else "params"]), {**description, "ema": ema}


def load_both(
    workdir: str | os.PathLike[str], step: int | None = None
) -> tuple[Parameters, Parameters | None, dict[str, Any]]:
    """Returns parameters and their moving average as host arrays, and the description of the run.

    Args:
        workdir: folder of a training run, or one that `save_parameters` made.
        step: step of the checkpoint; None: the newest good one.

    Returns:
        Two nested dicts of arrays, the second one None if the run keeps no moving average; and the description with
        two keys added: "step", and "ema", which says whether there is a moving average.

    Raises:
        CheckpointError: no checkpoint is good. Arrays with NaN or Inf are not good.
    """
    items, description = _load(workdir, step)
    ema = _on_host(items["ema"]) if "ema" in items else None
    return _on_host(items["params"]), ema, {**description, "ema": ema is not None}


def save_parameters(workdir: str | os.PathLike[str], params: Parameters, description: Mapping[str, Any]) -> None:
    """Makes a workdir that holds parameters; every reader takes it like the workdir of a training run.

    Args:
        workdir: a folder without checkpoints.
        params: nested dict of arrays.
        description: JSON that says what the model is; also written to `config.json`.

    Raises:
        CheckpointError: the folder holds checkpoints already or cannot be written.
        ValueError: an array holds NaN or Inf.
    """
    good = jax.device_get(finite(params))
    if not all(good.values()):
        raise ValueError(f"params: expected finite numbers, got {records.not_finite(good)}")
    description = records.plain(description, "description")
    checkpoints = Checkpoints(workdir)
    try:
        if checkpoints.steps():
            raise CheckpointError(f"{checkpoints.folder} holds checkpoints already")
        checkpoints.save_parameters(params, description)
    finally:
        checkpoints.close()
    records.write_config(workdir, description)


def _load(workdir: str | os.PathLike[str], step: int | None) -> tuple[dict[str, Parameters], dict[str, Any]]:
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        items, record = checkpoints.load_parameters(step)
    finally:
        checkpoints.close()
    return items, {**record["description"], "step": record["step"]}


def _on_host(tree: Parameters) -> Parameters:
    return jax.tree.map(np.asarray, tree)
