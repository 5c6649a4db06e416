"""The part that all kernels share: the lines that a CTA walks, and the pipeline of copies around its arithmetic.

A CTA owns (image, chunk, segment of the line, channel block). Its warpgroups are side by side along the line. Each has
its own ring of TMA loads; they share the state line in shared memory. Chunks are spread over the grid, so no state is
reset. Directions differ only in `Pipeline.at`: nothing is transposed.

If a line is cut into segments, each CTA also computes a ghost zone at both ends, which its neighbours own. With every
line one more pixel of the ghost zone becomes wrong. So after `tile.ghost` lines the kernel writes the state of its own
pixels and ends, and the next launch reads the state with fresh ghost zones.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.directions import walked_axis, walks_back
from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.tiles import Tile


class Pipeline:
    """The walk of one kernel over (B, H, W, ...) arrays.

    Args:
        shape: (B, H, W, C) of x.
        direction: of the scan.
        chunk: lines after which the state restarts, or None.
        tile: the part of the map that a CTA takes.
        reverse: whether the lines are walked from the last to the first, as for a gradient.
    """

    def __init__(self, shape: tuple[int, ...], direction: str, chunk: int | None, tile: Tile, reverse: bool):
        self.shape, self.batch, self.channels = shape, shape[0], shape[-1]
        self.axis, self.back = walked_axis(direction), walks_back(direction)
        self.lines, self.length = shape[self.axis], shape[3 - self.axis]
        self.chunk = min(chunk or self.lines, self.lines)
        self.tile, self.reverse = tile, reverse
        self.stages = min(tile.stages, self.chunk)
        self.chunks = -(-self.lines // self.chunk)
        self.segments = -(-self.length // tile.own) if tile.ghost else 1
        self.blocks = -(-self.channels // tile.channels)
        self.launches = -(-self.chunk // tile.ghost) if tile.ghost else 1

    @property
    def grid(self) -> dict[str, int]:
        """The launch's grid: axis names and sizes."""
        # Channel blocks come last: neighbouring blocks share sectors of memory and should run at the same time.
        return {"image": self.batch, "chunk": self.chunks, "segment": self.segments, "block": self.blocks}

    def state(self, lines: int) -> jax.ShapeDtypeStruct:
        """The state that one launch passes to the next: `lines` lines for each image and chunk, rounded up to tiles."""
        pixels, channels = self.segments * self.tile.own, self.blocks * self.tile.channels
        return jax.ShapeDtypeStruct((self.batch, self.chunks, lines, pixels, channels), jnp.float32)

    def enter(self, launch: Any) -> None:
        """Finds the place of this CTA and warpgroup; a kernel calls it first. `launch` holds the launch's number."""
        tile = self.tile
        self.image, self.chunk_index, self.segment, self.block_index, self.warpgroup = (
            lax.axis_index(name) for name in (*self.grid, "warpgroup")
        )
        self.block = pl.ds(self.block_index * tile.channels, tile.channels)
        self._first = self.chunk_index * self.chunk
        self._lines_of_chunk = jnp.minimum(self.chunk, self.lines - self._first)
        self.launch, self._walked, self.count = 0, 0, self._lines_of_chunk
        # The first segment has no ghost zone before it. Its tile still starts at the border, because the interpreter
        # treats a TMA copy that starts at a negative pixel differently from the GPU.
        self.offset, start = 0, 0
        if tile.ghost:
            start = jnp.maximum(self.segment * tile.own - tile.ghost, 0)
            self.offset = self.segment * tile.own - start
            self.launch = launch[...]
            self._walked = self.launch * tile.ghost
            self.count = jnp.clip(self._lines_of_chunk - self._walked, 0, tile.ghost)
        self.place = self.warpgroup * tile.rows  # this warpgroup's first pixel, within the CTA's part of the line
        # Always traced, even if 0: a slice longer than its axis is refused if its start is known while tracing.
        self.pixel = start + self.place

    def line(self, n: Any) -> Any:
        """The index in the image of the n-th line that this launch walks."""
        n = self._walked + n
        position = self._first + (self._lines_of_chunk - 1 - n if self.reverse else n)
        return self.lines - 1 - position if self.back else position

    def line_before(self, n: Any) -> Any:
        """The index of the line whose state line n reads; outside the image if there is none."""
        is_first = self._walked + n == (self._lines_of_chunk - 1 if self.reverse else 0)
        return jnp.where(is_first, self.lines, self.line(n + 1 if self.reverse else n - 1))

    def at(self, ref: Any, line: Any, pixels: Any, *slots: Any) -> Any:
        """Pixels of a line of a (B, H, W, ..., C) array. No other code depends on the direction."""
        place = (line, pixels) if self.axis == 1 else (pixels, line)
        return ref.at[(self.image, *place, *slots, self.block)]

    def rows(self) -> Any:
        """This warpgroup's pixels."""
        return pl.ds(self.pixel, self.tile.rows)

    def store(self, source: Any, ref: Any, n: Any, *slots: Any) -> None:
        """Starts the copy of a tile of results, (rows, ..., channels), to line n, for the pixels that the CTA owns."""
        tile = self.tile
        target = self.rows()
        if tile.ghost:
            source = source.at[pl.ds(self.offset, tile.own)]
            target = pl.ds(self.segment * tile.own, tile.own)
        primitives.store(source, self.at(ref, self.line(n), target, *slots))

    def fetch_before(self, ref: Any, target: Any, n: Any, margin: int, barrier: Any) -> None:
        """Starts the copy of the line that line n reads, with a margin of pixels on both sides; see `before`.

        `target` has room for a third margin: at the border the copy is placed one margin later in it, instead of
        starting at a negative pixel.
        """
        size = self.tile.rows + 2 * margin
        source = pl.ds(jnp.maximum(self.pixel - margin, 0), size)
        place = pl.ds(jnp.where(self.pixel == 0, margin, 0), size)
        primitives.fetch(self.at(ref, self.line_before(n), source), target.at[place], barrier)

    def before(self, ref: Any, margin: int) -> list[jax.Array]:
        """The line that `fetch_before` copied, at the neighbours of smaller, same and larger index."""
        rows, channels = self.tile.rows, self.tile.channels
        if self.lines == 1:  # TMA drops axes of length 1, and with them the zeros outside the image
            return [primitives.zeros(rows, channels)] * 3
        tiles = [primitives.load(ref.at[pl.ds(margin + shift, rows)]) for shift in (-1, 0, 1)]
        pixel = self.pixel + primitives.pixels(rows, channels)
        return [jnp.where(pixel > 0, tiles[0], 0.0), *tiles[1:]]

    def walk(
        self,
        load: Callable[[Any, Any], None] | None,
        compute: Callable[[Any, Any, Any, Any, Any], Any],
        store: Callable[[Any, Any], None],
        arrived: Any,
        joint: Any,
        carry: Any,
        *,
        before: int = 0,
        following: Callable[[Any, Any], None] | None = None,
    ) -> Any:
        """Loads, computes and stores line after line.

        Args:
            load: load(n, slot) starts the copies of line n into a slot of the ring; None if there is nothing to copy.
            compute: compute(n, slot, out, now, carry) reads the slot and the state buffer `now` (0 or 1), writes the
                other state buffer and the results `out`, and returns the new carry.
            store: store(n, out) starts the copies of the results.
            arrived: barriers of the slots, `stages` for each warpgroup.
            joint: the barrier of the warpgroups.
            carry: values that a thread keeps from line to line.
            before: lines that earlier walks of the same kernel have passed; the last of these walks has started the
                copies of this one's first lines.
            following: `load` of the next walk of the kernel, which has at least as many lines as there are slots.

        Returns:
            The carry after the last line.
        """
        stages, stores = self.stages, self.tile.stores
        if load is not None and not before:
            for n in range(stages):
                pl.when(n < self.count)(functools.partial(load, n, n))

        def line(n, carry):
            slot, out = lax.rem(before + n, stages), lax.rem(before + n, stores)
            if load is not None:
                primitives.wait(arrived.at[self.warpgroup * stages + slot])
            primitives.wait_stored(stores - 1)  # the old results in `out` have been copied
            carry = compute(n, slot, out, lax.rem(n, 2), carry)
            # This barrier orders four things. The new state is written before a thread reads its neighbours' part, and
            # the results before TMA reads them; the old state and the slot are read before they are overwritten.
            primitives.commit()
            store(n, out)
            primitives.end_group()
            if load is not None:
                pl.when(n + stages < self.count)(functools.partial(load, n + stages, slot))
            if following is not None:
                pl.when(n + stages >= self.count)(functools.partial(following, n + stages - self.count, slot))
            self.meet(joint)
            return carry

        return lax.fori_loop(0, self.count, line, carry)

    def run(
        self,
        name: str,
        body: Callable[..., None],
        inputs: Sequence[jax.Array],
        results: Sequence[primitives.Blank],
        passed_lines: int,
        scratch: Sequence[Any],
        interpret: bool,
    ) -> None:
        """Launches a kernel, as many times as its ghost zones require.

        Args:
            name: of the kernel.
            body: called with the refs of the launch's number, `inputs`, the state from the launch before, the results,
                the state for the next launch, and `scratch`. Without ghost zones the number and both states are None.
            inputs: arrays that it reads.
            results: arrays that it writes.
            passed_lines: lines of state that a launch passes to the next.
            scratch: shared memory and barriers.
            interpret: whether the interpreter runs it.
        """
        options: Any = dict(name=name, grid=self.grid, warpgroups=self.tile.warpgroups, interpret=interpret)
        if self.tile.ghost:
            state = self.state(passed_lines)
            empty = (lax.empty(result.like.shape, result.like.dtype) for result in results)
            refs = [
                jax.new_ref(a if result.array is None else result.array)
                for a, result in zip(empty, results, strict=True)
            ]

            def launch(n, given):
                return primitives.launch(body, (n, *inputs, given), refs, [state], scratch, **options)[0]

            lax.fori_loop(0, self.launches, launch, jnp.zeros(state.shape, state.dtype))
            for result, ref in zip(results, refs, strict=True):
                result.array = ref[...]
            return

        there = [result for result in results if result.array is not None]
        new = [result for result in results if result.array is None]
        refs = [jax.new_ref(result.array) for result in there]

        def whole(*given):
            arrays = len(inputs) + len(results)
            taken, written, rest = given[: len(inputs)], given[len(inputs) : arrays], given[arrays:]
            places = dict(zip(map(id, (*there, *new)), written, strict=True))
            body(None, *taken, None, *(places[id(result)] for result in results), None, *rest)

        made = primitives.launch(whole, inputs, refs, [result.like for result in new], scratch, **options)
        for result, ref in zip(there, refs, strict=True):
            result.array = ref[...]
        for result, array in zip(new, made, strict=True):
            result.array = array

    def meet(self, joint: Any) -> None:
        """All warpgroups wait until the state line is complete: a neighbour may belong to another warpgroup."""
        if self.tile.warpgroups > 1:
            primitives.meet(joint)


class StateLines:
    """The state in shared memory: two buffers of `lines` float32 lines, each between halos of zeros.

    The scratch is (2, lines, pixels and halos, channels). So a neighbour is a load at an offset of one pixel.
    """

    def __init__(self, pipeline: Pipeline, lines: int):
        tile = pipeline.tile
        self.pipeline, self.lines = pipeline, lines
        # TMA writes the state of an earlier launch after the first halo, which therefore has an aligned size.
        self.halo = max(1, primitives.ALIGNMENT // (4 * tile.channels))
        size = primitives.full_stores(tile.extent + 2 * self.halo, tile.channels)
        self.scratch = primitives.shared_memory((2, lines, size, tile.channels), jnp.float32)

    def rows(self, shift: int = 0) -> Any:
        """This warpgroup's pixels, shifted along the line by `shift`."""
        return pl.ds(self.pipeline.place + self.halo + shift, self.pipeline.tile.rows)

    def clear(self, ref: Any, joint: Any) -> None:
        """Fills everything with zeros, before the first line."""

        def fill():
            for buffer in range(2):
                for k in range(self.lines):
                    primitives.clear(ref.at[buffer, k])

        if self.pipeline.tile.warpgroups == 1:
            fill()
        else:
            pl.when(self.pipeline.warpgroup == 0)(fill)
        primitives.commit()
        self.pipeline.meet(joint)

    def receive(self, ref: Any, source: Any, targets: Sequence[tuple[int, int]], barrier: Any) -> None:
        """Copies the state from the launch before into the buffers: its line k to (buffer, line) = `targets[k]`."""
        walk = self.pipeline
        for k, (buffer, line) in enumerate(targets):
            place = source.at[walk.image, walk.chunk_index, k, walk.rows(), walk.block]
            primitives.fetch(place, ref.at[buffer, line, self.rows()], barrier)
        primitives.wait(barrier)

    def send(self, ref: Any, sources: Sequence[tuple[Any, int]], target: Any) -> None:
        """Copies the CTA's own pixels of each (buffer, line) in `sources` to the state for the next launch."""
        walk, own = self.pipeline, self.pipeline.tile.own
        primitives.commit()
        for k, (buffer, line) in enumerate(sources):
            pixels = pl.ds(self.halo + walk.offset, own)
            place = target.at[walk.image, walk.chunk_index, k, pl.ds(walk.segment * own, own), walk.block]
            primitives.store(ref.at[buffer, line, pixels], place)
        primitives.end_group()
