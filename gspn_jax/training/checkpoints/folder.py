"""The checkpoints of one working directory: written in the background, verified when read.

A checkpoint is a folder `<workdir>/checkpoints/<step>` with the items `params`, `ema` (if the run keeps one),
`optimizer`, and `record`: JSON with the data-pipeline state, the run's description and, for every array, its shape,
dtype and an exact fingerprint taken on the device before the array left it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from gspn_jax.training.checkpoints import record as records
from gspn_jax.training.checkpoints.fingerprint import fingerprints, finite, leaves_by_path
from gspn_jax.training.checkpoints.set_aside import set_aside
from gspn_jax.training.state import Parameters, TrainState

FOLDER = "checkpoints"
REJECTED = "rejected"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says in one line which one, where and why."""


def _examine(tree: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns path -> fingerprint, and path -> whether all numbers of the array are finite."""
    return fingerprints(tree), finite(tree)


class Checkpoints:
    """The checkpoints of one working directory.

    Args:
        workdir: the parent folder.
        keep: how many checkpoints stay; the oldest is deleted after a newer one is complete.
        read_only: nothing is created, moved or deleted.

    Raises:
        CheckpointError: the folder cannot be made or, with `read_only`, does not exist.
        ValueError: an argument is out of its range.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 3, read_only: bool = False):
        if keep < 1:
            raise ValueError(f"keep: expected an integer >= 1, got {keep}")
        if not os.fspath(workdir):
            raise ValueError("workdir: expected the name of a folder, got ''")
        self.folder = Path(workdir).absolute() / FOLDER
        self._read_only = read_only
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"no checkpoints under {self.folder.parent}: {self.folder} is not a folder")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            enable_async_checkpointing=not read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot use {self.folder} for checkpoints: {_one_line(error)}") from error
        self._pending: int | None = None

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def last_good(self) -> str:
        """Returns words that name the last complete checkpoint."""
        steps = [step for step in self.steps() if step != self._pending]
        if not steps:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is step {steps[-1]} ({self.folder / str(steps[-1])})"

    def save(self, state: TrainState, description: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Waits for an earlier save, then starts to write `state`. A step that was written before is not touched.

        Args:
            state: copied off the device before this method returns, so that it may be donated.
            description: JSON that says what the run is; `load_parameters` returns it.
            progress: JSON that says where the run stands, such as the state of the data pipeline.

        Raises:
            CheckpointError: this or an earlier save failed, or the state holds a number that is not finite.
        """
        step = int(jax.device_get(state.step))
        self.wait()
        if step in self.steps():
            return
        items = _items(state)
        prints, good = jax.device_get(_examine(items))
        if not all(good.values()):
            raise CheckpointError(f"step {step} is not saved: {records.not_finite(good)}; {self.last_good()}")
        self._write(step, items, records.make(items, prints, description, progress))

    def save_parameters(self, params: Parameters, description: Mapping[str, Any]) -> None:
        """Writes parameters without a state of training as step 0, and waits until they are on disk."""
        items = {"params": params}
        self._write(0, items, records.make(items, jax.device_get(_examine(items)[0]), description, {}))
        self.wait()

    def _write(self, step: int, items: Mapping[str, Any], record: dict[str, Any]) -> None:
        args: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in items.items()}  # pyright: ignore[reportCallIssue]
        args["record"] = ocp.args.JsonSave(record)  # pyright: ignore[reportCallIssue]
        self._pending = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error
        self._pending = None

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed; does not wait."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def _failed(self, error: BaseException) -> CheckpointError:
        where = self.folder / str(self._pending)
        return CheckpointError(f"cannot write checkpoint {where}: {_one_line(error)}; {self.last_good()}")

    def newest_record(self) -> dict[str, Any] | None:
        """Returns the record of the newest checkpoint whose record can be read; None without checkpoints."""
        for step in reversed(self.steps()):
            try:
                return self._record(step)
            except Exception as error:
                logging.debug("record of checkpoint %d: %s", step, error)
        return None

    def _record(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return records.checked(self._manager.restore(step, args=args)["record"])

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest good state and its record; None without checkpoints.

        Args:
            abstract: ShapeDtypeStructs with the shardings that the state gets; they need not be those of the run that
                wrote it.

        Raises:
            CheckpointError: no checkpoint is good.
            ValueError: a good checkpoint has other shapes.
        """
        found = self._newest_good(self.steps(), _items(abstract))
        if found is None:
            return None
        items, record = found
        optimizer = items["optimizer"]
        state = TrainState(
            step=optimizer["step"], params=items["params"], ema=items.get("ema"), opt_state=optimizer["state"]
        )
        return state, record

    def load_parameters(self, step: int | None) -> tuple[dict[str, Parameters], dict[str, Any]]:
        """Returns the newest good checkpoint, or a named one.

        Returns:
            Arrays on the devices, under "params" and, if the run keeps a moving average, "ema"; and the record.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} under {self.folder}: expected one of {steps}")
        # Both are verified whatever the reader asks for, so that all readers get the same checkpoint.
        newest = self.newest_record()
        wanted = {name: None for name in ("params", "ema") if newest is None or name in newest["arrays"]}
        found = self._newest_good(steps if step is None else [step], wanted)
        if found is None:
            raise CheckpointError(f"no checkpoints under {self.folder}")
        return found

    def _newest_good(self, steps: list[int], wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bad: dict[int, str] = {}
        for step in reversed(steps):
            try:
                items, record = self._read(step, wanted)
            except records.OtherShapes as error:
                raise ValueError(f"checkpoint {self.folder / str(step)}: {error}") from error
            except Exception as error:  # tensorstore, zstd, JSON, orbax: whatever a damaged file provokes
                bad[step] = _one_line(error)
                continue
            for damaged, reason in bad.items():
                logging.warning(
                    "checkpoint %s is damaged (%s): going back to the last good one, %s",
                    self.folder / str(damaged), reason, self.folder / str(step),
                )  # fmt: skip
            self._set_aside(bad)
            return items, record
        if bad:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in bad.items())
            raise CheckpointError(f"no checkpoint under {self.folder} can be read ({reasons})")
        return None

    def _read(self, step: int, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        record = self._record(step)
        missing = sorted(set(wanted) - set(record["arrays"]))
        if missing:
            raise records.OtherShapes(f"it holds {sorted(record['arrays'])}, not {missing}")
        targets = {
            name: records.abstract(record["arrays"][name]) if target is None else target
            for name, target in wanted.items()
        }
        for name, target in targets.items():
            records.check_shapes(record["arrays"][name], leaves_by_path(target))
        problem = ""
        items: dict[str, Any] = {}
        try:
            args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}  # pyright: ignore[reportCallIssue]
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            items = {name: restored[name] for name in targets}
        except Exception as error:
            problem = _one_line(error)
        # The fingerprints are a computation of all processes: none may enter it if another one failed to read.
        if not _everywhere(not problem):
            raise CheckpointError(problem or "another process cannot read it")
        prints, good = jax.device_get(_examine(items))
        records.check_fingerprints(record["arrays"], prints)
        if not all(good.values()):
            raise CheckpointError(records.not_finite(good))
        return items, record

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        """Moves damaged checkpoints to `rejected/`, so that their steps can be written again."""
        if not damaged or self._read_only:
            return
        if jax.process_index() == 0:
            for step in damaged:
                target = self.folder.parent / REJECTED / str(step)
                target.parent.mkdir(exist_ok=True)
                set_aside(self.folder / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits for a running save and ends the background threads."""
        self.wait()
        self._manager.close()


def _items(state: TrainState) -> dict[str, Any]:
    items = {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state}}
    return items if state.ema is None else items | {"ema": state.ema}


def _everywhere(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _one_line(error: BaseException) -> str:
    text = str(error).split("See full TensorStore details")[0]  # pages of them
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-150:]}"  # the cause comes last
