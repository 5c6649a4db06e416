"""A profiler trace of some steps."""

from collections.abc import Mapping
from pathlib import Path

import jax

from gspn_jax.training.options import TrainOptions


class Profile:
    """Writes a profiler trace of some steps."""

    def __init__(self, options: TrainOptions):
        self._steps = options.profile_steps or (0, 0)
        self._folder = str(Path(options.workdir) / "profile")
        self._on = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False

    def before(self, step: int) -> None:
        """Call before step number `step`, from 0."""
        if not self._on and self._steps[0] <= step < self._steps[1]:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Call with the numbers of a step, when `step` steps are done."""
        if self._on and step >= self._steps[1]:
            jax.block_until_ready(values)
            self.__exit__()
