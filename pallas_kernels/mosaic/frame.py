"""What all kernels share: the lines that a CTA walks, the ring of copies around its arithmetic, and the launches.

A launch walks all directions of a square map, or those of one axis. A CTA owns (image, group of chunks, direction,
segment of the line, channel block). Its warpgroups are side by side along the line. Each has its own ring of TMA loads;
they share the state line in shared memory. Directions differ only in `Frame.at`: nothing is transposed.

If a line is cut into segments, each CTA also computes a ghost zone at both ends, which its neighbours own. With every
line one more pixel of the ghost zone becomes wrong. So after `tile.ghost` lines the kernel writes the state of its own
pixels and ends, and the next launch reads the state with fresh ghost zones.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.directions import walked_axis, walks_back
from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.tiles import Tile

# Launches in the body of a loop over launches: a loop of one would copy the state and count in kernels of their own.
_UNROLLED = 8


class Frame:
    """The walk of one kernel over (B, H, W, ...) arrays.

    Args:
        shape: (B, H, W, C) of x.
        directions: that the launch walks, in the order of `DIRECTIONS`: one, the two of an axis, or all four of a
            square map.
        slots: their indices along the axis of directions of arrays that have one.
        chunk: lines after which the state restarts, or None.
        tile: the part of the map that a CTA takes.
        reverse: whether the lines are walked from the last to the first, as for a gradient.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        directions: Sequence[str],
        slots: Sequence[int],
        chunk: int | None,
        tile: Tile,
        reverse: bool,
    ):
        self.shape, self.batch, self.channels = shape, shape[0], shape[-1]
        self.directions, self.slots = tuple(directions), tuple(slots)
        self.axes = tuple(sorted({walked_axis(direction) for direction in directions}))
        (self.lines,), (self.length,) = ({shape[axis] for axis in axes} for axes in (self.axes, _others(self.axes)))
        self.chunk = min(chunk or self.lines, self.lines)
        self.tile, self.reverse = tile, reverse
        self.group = min(self.chunk * tile.chunks, self.lines)  # lines that a CTA walks
        self.stages = min(tile.stages, self.group)
        self.segments = -(-self.length // tile.own) if tile.ghost else 1
        self.blocks = -(-self.channels // tile.channels)
        self.launches = -(-self.group // tile.ghost) if tile.ghost else 1
        # Channel blocks come last: neighbouring blocks share sectors of memory and should run at the same time, as
        # should the directions of an image.
        self.grid = dict(
            image=self.batch,
            group=-(-self.lines // self.group),
            direction=len(self.directions),
            segment=self.segments,
            block=self.blocks,
        )

    def state(self, lines: int) -> jax.ShapeDtypeStruct:
        """The state that one launch passes to the next: `lines` lines for each walk, rounded up to tiles."""
        walks = self.batch * self.grid["group"] * self.grid["direction"]
        pixels, channels = self.segments * self.tile.own, self.blocks * self.tile.channels
        return jax.ShapeDtypeStruct((walks, lines, pixels, channels), jnp.float32)

    def enter(self, number: Any) -> None:
        """Finds the place of this CTA and warpgroup; a kernel calls it first, with the launch's `number`."""
        tile, rest, places = self.tile, lax.axis_index("cta"), {}
        for name, size in reversed(self.grid.items()):
            if name == "direction":
                self.walk_index = rest
            places[name], rest = lax.rem(rest, size), lax.div(rest, size)
        self.image, group, self.direction, self.segment, self.block_index = (places[name] for name in self.grid)
        self.warpgroup = lax.axis_index("warpgroup")
        self.block = pl.ds(self.block_index * tile.channels, tile.channels)
        first, *others = self.slots
        self.slot = first + self.direction * (others[0] - first) if others else first
        self.walks_rows = self.axes == (1,) if len(self.axes) == 1 else lax.rem(self.direction, 2) == 1
        # Of several directions, those of the second half walk back.
        several = len(self.directions) > 1
        self.back = self.direction >= len(self.directions) // 2 if several else walks_back(self.directions[0])

        self._first = group * self.group
        self._lines_of_group = jnp.minimum(self.group, self.lines - self._first)
        self._walked, self.count = 0, self._lines_of_group
        # The first segment has no ghost zone before it. Its tile still starts at the border, because the interpreter
        # treats a TMA copy that starts at a negative pixel differently from the GPU.
        self.offset, start = 0, 0
        if tile.ghost:
            start = jnp.maximum(self.segment * tile.own - tile.ghost, 0)
            self.offset = self.segment * tile.own - start
            self._walked = number * tile.ghost
            self.count = jnp.clip(self._lines_of_group - self._walked, 0, tile.ghost)
        self.place = self.warpgroup * tile.rows  # this warpgroup's first pixel, within the CTA's part of the line
        # Always traced, even if 0: a slice longer than its axis is refused if its start is known while tracing.
        self.pixel = start + self.place

    def _position(self, n: Any) -> Any:
        """The place of the n-th line that this launch walks, in the order of the direction, within the group."""
        n = self._walked + n
        return self._lines_of_group - 1 - n if self.reverse else n

    def line(self, n: Any) -> Any:
        """The index in the image of the n-th line that this launch walks."""
        position = self._first + self._position(n)
        if isinstance(self.back, bool):
            return self.lines - 1 - position if self.back else position
        return jnp.where(self.back, self.lines - 1 - position, position)

    def line_before(self, n: Any) -> Any:
        """The index of the line whose state line n reads; outside the image if there is none."""
        is_first = lax.rem(self._position(n), self.chunk) == 0
        return jnp.where(is_first, self.lines, self.line(n + 1 if self.reverse else n - 1))

    def unless_first(self, n: Any, compute: Callable[[], Any], otherwise: Callable[[], Any] | None = None) -> Any:
        """compute(), or otherwise() if line n is its chunk's first in the order of the direction; zeros by default.

        It saves work. Where a CTA walks one chunk only, compute() finds zeros there and gives the same.
        """
        return self._unless(lax.rem(self._position(n), self.chunk) == 0, compute, otherwise)

    def unless_last(self, n: Any, compute: Callable[[], Any]) -> Any:
        """compute(), or zeros if line n is the last of its chunk, likewise."""
        return self._unless(lax.rem(self._position(n) + 1, self.chunk) == 0, compute, None)

    def _unless(self, condition: Any, compute: Callable[[], Any], otherwise: Callable[[], Any] | None) -> Any:
        if self.group == self.chunk:
            return compute()
        nothing = lambda: primitives.zeros(self.tile.rows, self.tile.channels)  # noqa: E731
        return lax.cond(condition, otherwise or nothing, compute)

    def by_axis(self, copy: Callable[[int], None]) -> None:
        """copy(axis) for the axis that this CTA walks, 1 for rows and 2 for columns."""
        if len(self.axes) == 1:
            copy(self.axes[0])
        else:
            lax.cond(self.walks_rows, lambda: copy(1), lambda: copy(2))

    def at(self, ref: Any, axis: int, line: Any, pixels: Any, *, slot: Any = None, part: Any = None) -> Any:
        """Pixels of a line of a (B, H, W, C) array. No other code depends on the axis.

        Args:
            ref: the array.
            axis: from `by_axis`.
            line: index of the line.
            pixels: slice along the line.
            slot: index of the direction in a (B, D, H, W, C) array.
            part: index or slice of the axis before the last in a (B, H, W, ..., C) array.
        """
        place = (line, pixels) if axis == 1 else (pixels, line)
        before, after = ((() if index is None else (index,)) for index in (slot, part))
        return ref.at[(self.image, *before, *place, *after, self.block)]

    def rows(self) -> Any:
        """This warpgroup's pixels."""
        return pl.ds(self.pixel, self.tile.rows)

    def fetch(self, ref: Any, target: Any, axis: int, n: Any, barrier: Any, **indices: Any) -> None:
        """Starts the copy of line n into shared memory; `indices` as in `at`."""
        primitives.fetch(self.at(ref, axis, self.line(n), self.rows(), **indices), target, barrier)

    def store(self, source: Any, ref: Any, axis: int, n: Any, **indices: Any) -> None:
        """Starts the copy of a tile of results, (rows, ..., channels), to line n, for the pixels that the CTA owns."""
        tile = self.tile
        target = self.rows()
        if tile.ghost:
            source = source.at[pl.ds(self.offset, tile.own)]
            target = pl.ds(self.segment * tile.own, tile.own)
        primitives.store(source, self.at(ref, axis, self.line(n), target, **indices))

    def fetch_before(self, ref: Any, target: Any, axis: int, n: Any, margin: int, barrier: Any, **indices: Any) -> None:
        """Starts the copy of the line that line n reads, with a margin of pixels on both sides; see `before`.

        `target` has room for a third margin: at the border the copy is placed one margin later in it, instead of
        starting at a negative pixel.
        """
        size = self.tile.rows + 2 * margin
        source = pl.ds(jnp.maximum(self.pixel - margin, 0), size)
        place = pl.ds(jnp.where(self.pixel == 0, margin, 0), size)
        primitives.fetch(self.at(ref, axis, self.line_before(n), source, **indices), target.at[place], barrier)

    def before(self, ref: Any, margin: int) -> list[jax.Array]:
        """The line that `fetch_before` copied, at the neighbours of smaller, same and larger index."""
        rows, channels = self.tile.rows, self.tile.channels
        if self.lines == 1:  # TMA drops axes of length 1, and with them the zeros outside the image
            return [primitives.zeros(rows, channels)] * 3
        tiles = [primitives.load(ref.at[pl.ds(margin + shift, rows)]) for shift in (-1, 0, 1)]
        pixel = self.pixel + primitives.pixels(rows, channels)
        return [jnp.where(pixel > 0, tiles[0], 0.0), *tiles[1:]]

    def start(self, load: Callable[[Any, Any], None]) -> None:
        """Starts the copies of the first lines; `load` as in `walk`."""
        for n in range(self.stages):
            pl.when(n < self.count)(functools.partial(load, n, n))

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
    ) -> Any:
        """Loads, computes and stores line after line. `start` has started the copies of the first lines.

        Args:
            load: load(n, slot) starts the copies of line n into a slot of the ring; None if there is nothing to copy.
            compute: compute(n, slot, out, now, carry) reads the slot and the state buffer `now` (0 or 1), writes the
                other state buffer and the results `out`, and returns the new carry.
            store: store(n, out) starts the copies of the results.
            arrived: barriers of the slots, `stages` for each warpgroup.
            joint: the barrier of the warpgroups.
            carry: values that a thread keeps from line to line.
            before: lines that earlier walks of the same kernel have passed.

        Returns:
            The carry after the last line.
        """
        stages, stores = self.stages, self.tile.stores

        def line(n, carry):
            slot, out = lax.rem(n, stages), lax.rem(before + n, stores)
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
            self.meet(joint)
            return carry

        return lax.fori_loop(0, self.count, line, carry)

    def run(
        self,
        name: str,
        body: Callable[..., None],
        inputs: Mapping[str, jax.Array],
        results: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
        passed_lines: int,
        scratch: Mapping[str, Any],
        interpret: bool,
    ) -> dict[str, jax.Array]:
        """Launches a kernel, as many times as its ghost zones require, and returns the results.

        Args:
            name: of the kernel.
            body: as in `primitives.launch`. With ghost zones its refs also hold "round" and "offset", which give
                the launch's number, and "given" and "passed", the state from the launch before and for the next.
            inputs: arrays that it reads.
            results: arrays that it fills or creates.
            passed_lines: lines of state that a launch passes to the next.
            scratch: shared memory and barriers.
            interpret: whether the interpreter runs it.
        """
        if interpret:  # elements that no kernel writes are noticed
            results = {key: _started(like, jnp.nan) for key, like in results.items()}
        options: Any = dict(
            name=name, ctas=math.prod(self.grid.values()), warpgroups=self.tile.warpgroups, interpret=interpret
        )
        if not self.tile.ghost:
            refs = {key: jax.new_ref(a) for key, a in results.items() if isinstance(a, jax.Array)}
            made: Any = {key: like for key, like in results.items() if key not in refs}
            made = primitives.launch(body, inputs, refs, made, scratch, **options)
            return {key: refs[key][...] if key in refs else made[key] for key in results}

        refs = {key: jax.new_ref(_started(like)) for key, like in results.items()}
        state = self.state(passed_lines)

        @jax.jit  # traced and lowered once
        def launch(inputs, refs):
            return primitives.launch(body, inputs, refs, {"passed": state}, scratch, **options)["passed"]

        def several(turn, given, count):
            for offset in range(count):
                # Both numbers are there already: the launch's own would take a kernel to compute.
                given = launch({**inputs, "round": turn, "offset": jnp.int32(offset), "given": given}, refs)
            return given

        given, (loops, rest) = jnp.zeros(state.shape, state.dtype), divmod(self.launches, _UNROLLED)
        if loops:
            given = lax.fori_loop(0, loops, lambda n, given: several(n, given, _UNROLLED), given)
        several(jnp.int32(loops), given, rest)
        return {key: ref[...] for key, ref in refs.items()}

    def number(self, refs: Mapping[str, Any]) -> Any:
        """The launch's number, from a kernel's refs."""
        return refs["round"][...] * _UNROLLED + refs["offset"][...] if self.tile.ghost else 0

    def meet(self, joint: Any) -> None:
        """All warpgroups wait until the state line is complete: a neighbour may belong to another warpgroup."""
        if self.tile.warpgroups > 1:
            primitives.meet(joint)


def launches_of(directions: Sequence[str], height: int, width: int) -> list[tuple[int, ...]]:
    """The indices of the directions that each launch walks: all of a square map, else those of an axis."""
    slots = range(len(directions))
    if height == width:
        return [tuple(slots)]
    by_axis = ([slot for slot in slots if walked_axis(directions[slot]) == axis] for axis in (2, 1))
    return [tuple(group) for group in by_axis if group]


def _others(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(3 - axis for axis in axes)


def _started(like: jax.Array | jax.ShapeDtypeStruct, value: float | None = None) -> jax.Array:
    """The array itself, or a new one that holds `value` everywhere, or anything."""
    if isinstance(like, jax.Array):
        return like
    return lax.empty(like.shape, like.dtype) if value is None else jnp.full(like.shape, value, like.dtype)
