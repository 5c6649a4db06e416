"""What a step knows: where results go, and whether the run is dry."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import provenance
from experiments.benchmarks import device_time
from experiments.benchmarks.first_card import running
from experiments.benchmarks.search import Search
from pallas_kernels import implementations


@dataclasses.dataclass(frozen=True)
class Context:
    """The options of a step.

    Attributes:
        step: name of the step, for its rows.
        out: folder of the results.
        kept: folder that stays between parts: compiled programs, and the results of all parts.
        dry: tiny maps in the interpreter.
        commit: the commit that is measured; "" asks git.
    """

    step: str
    out: Path
    kept: Path
    dry: bool = False
    commit: str = ""

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row to the results at once."""
        for folder in (self.out, self.kept):
            running.append(folder / running.RESULTS, {"step": self.step} | row)

    def search(self) -> Search:
        """Returns how to measure on this machine. Measured files go into `out`."""
        stamp = provenance.stamp()
        clock, why = ("host", "dry") if self.dry else device_time.choose_clock()
        if why and not self.dry:
            self.write({"kind": "clock", "clock": clock, "note": why})
        return Search(
            report=self.write,
            folder=self.out,
            about={key: stamp[key] for key in ("command", "commit", "date")}
            | ({"commit": self.commit} if self.commit else {}),
            clock=clock,
            dry=self.dry,
        )

    def require_card(self) -> None:
        """Raises RuntimeError unless JAX sees a card that the kernels run on, or the run is dry."""
        if self.dry:
            return
        reason = implementations()["mosaic"]
        if jax.default_backend() != "gpu" or reason is not None:
            raise RuntimeError(f"no card for the kernels: {reason or jax.devices()}")
