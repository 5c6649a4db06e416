"""The state of the scans in shared memory, and how one launch hands it to the next."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.frame import Frame


class StateLines:
    """The state in shared memory: two buffers of `lines` float32 lines, each between halos of zeros.

    The scratch is (2, lines, pixels and halos, channels). So a neighbour is a load at an offset of one pixel.
    """

    def __init__(self, frame: Frame, lines: int):
        tile = frame.tile
        self.frame, self.lines = frame, lines
        # TMA writes the state of an earlier launch after the first halo, which therefore has an aligned size.
        self.halo = max(1, primitives.ALIGNMENT // (4 * tile.channels))
        size = primitives.full_stores(tile.extent + 2 * self.halo, tile.channels)
        self.scratch = primitives.shared_memory((2, lines, size, tile.channels), jnp.float32)

    def rows(self, shift: int = 0) -> Any:
        """This warpgroup's pixels, shifted along the line by `shift`."""
        return pl.ds(self.frame.place + self.halo + shift, self.frame.tile.rows)

    def begin(self, ref: Any, given: Any, targets: Sequence[tuple[int, int]], joint: Any) -> jax.Array:
        """Fills the state for the first line, and returns that of the warpgroup's own pixels.

        It is zero, or `given` by the launch before, whose line k goes to (buffer, line) = `targets[k]`. The last of
        these lines is returned.
        """
        frame = self.frame
        self.clear(ref, joint)
        if not frame.tile.ghost:
            return primitives.zeros(frame.tile.rows, frame.tile.channels)
        for k, (buffer, line) in enumerate(targets):
            place = given.at[frame.walk_index, k, frame.rows(), frame.block]
            primitives.fetch(place, ref.at[buffer, line, self.rows()], joint)
        primitives.wait(joint)
        buffer, line = targets[-1]
        same = primitives.load(ref.at[buffer, line, self.rows()])
        if buffer == 1:
            primitives.commit()  # every thread has read it before the first line writes there
        return same

    def clear(self, ref: Any, joint: Any) -> None:
        """Fills everything with zeros."""

        def fill():
            for buffer in range(2):
                for k in range(self.lines):
                    primitives.clear(ref.at[buffer, k])

        if self.frame.tile.warpgroups == 1:
            fill()
        else:
            pl.when(self.frame.warpgroup == 0)(fill)
        primitives.commit()
        self.frame.meet(joint)

    def send(self, ref: Any, sources: Sequence[tuple[Any, int]], target: Any) -> None:
        """Copies the CTA's own pixels of each (buffer, line) in `sources` to the state for the next launch."""
        frame, own = self.frame, self.frame.tile.own
        primitives.commit()
        for k, (buffer, line) in enumerate(sources):
            pixels = pl.ds(self.halo + frame.offset, own)
            place = target.at[frame.walk_index, k, pl.ds(frame.segment * own, own), frame.block]
            primitives.store(ref.at[buffer, line, pixels], place)
        primitives.end_group()
