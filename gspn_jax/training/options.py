"""Options of the training loop."""

import dataclasses
import numbers

from gspn_jax.training.sharding import MeshOptions


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Options of the training loop.

    Attributes:
        workdir: folder of checkpoints, metrics and events; a run in this folder is continued.
        num_steps: optimiser steps of the whole run.
        batch_size: images per optimiser step, over all processes and accumulation parts.
        seed: seed of the parameters and of the keys of all steps.
        accumulate: number of parts of a batch; gradients are computed for one part after the other.
        log_steps: steps from one report to the next; 0: only at the end.
        evaluate_steps: steps from one evaluation to the next; 0: only at the end.
        checkpoint_steps: steps from one checkpoint to the next; 0: only at the end.
        keep: number of checkpoints that stay.
        mesh: axes of the device mesh.
        profile_steps: (first, end): a profiler trace of steps first to end - 1 goes to `<workdir>/profile`.

    Raises:
        ValueError: an option is out of its range.
    """

    workdir: str
    num_steps: int
    batch_size: int
    seed: int = 0
    accumulate: int = 1
    log_steps: int = 50
    evaluate_steps: int = 0
    checkpoint_steps: int = 0
    keep: int = 3
    mesh: MeshOptions = MeshOptions()
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self):
        if not self.workdir:
            raise ValueError(f"workdir: expected the name of a folder, got {self.workdir!r}")
        for name, least in (
            ("num_steps", 1), ("batch_size", 1), ("accumulate", 1), ("keep", 1),
            ("log_steps", 0), ("evaluate_steps", 0), ("checkpoint_steps", 0), ("seed", 0),
        ):  # fmt: skip
            if not isinstance(getattr(self, name), numbers.Integral) or getattr(self, name) < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {getattr(self, name)}")
        if self.profile_steps and not 0 <= self.profile_steps[0] < self.profile_steps[1] <= self.num_steps:
            raise ValueError(
                f"profile_steps: expected first < end within 0 and {self.num_steps}, got {self.profile_steps}"
            )

    def due(self, name: str, step: int) -> bool:
        """Returns whether `name` ("log", "evaluate" or "checkpoint") is to be done after `step`, as after the last."""
        interval = getattr(self, f"{name}_steps")
        return step == self.num_steps or bool(interval and step % interval == 0)
