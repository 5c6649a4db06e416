"""What the loop is told."""

import dataclasses

from gspn_jax.training.sharding import MeshOptions


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Attributes:
    workdir: folder of checkpoints, metrics and events; a run found in it is continued.
    num_steps: optimiser steps of the whole run.
    batch_size: images per optimiser step, over all processes and accumulation parts.
    seed: of parameters and steps.
    accumulate: parts that a batch is cut into, one after the other.
    log_steps, evaluate_steps, checkpoint_steps: intervals; 0 means at the end only.
    keep: how many checkpoints stay.
    mesh: the devices' axes.
    profile_steps: (first, end): a profiler trace of steps first to end - 1 goes to `<workdir>/profile`.
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
        for name, least in (
            ("num_steps", 1), ("batch_size", 1), ("accumulate", 1), ("keep", 1),
            ("log_steps", 0), ("evaluate_steps", 0), ("checkpoint_steps", 0), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {getattr(self, name)}")
        if self.profile_steps and not 0 <= self.profile_steps[0] < self.profile_steps[1] <= self.num_steps:
            raise ValueError(
                f"profile_steps: expected first < end within 0 and {self.num_steps}, got {self.profile_steps}"
            )

    def due(self, name: str, step: int) -> bool:
        """Whether the interval `name` ends at `step`; the last step always does."""
        interval = getattr(self, f"{name}_steps")
        return step == self.num_steps or bool(interval and step % interval == 0)
