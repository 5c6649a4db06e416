"""The cases in which the propagation kernels are compared with the reference, like `cases` for one scan."""

import dataclasses
import functools
import itertools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import VARIANTS, UpProjection, propagate, propagate_low_rank
from pallas_kernels.mosaic.tiles import Tile
from pallas_kernels.up_projection import maps_of
from tests.pallas_kernels.mosaic.cases import covering_set
from tests.tolerances import TOLERANCES, assert_close

# One launch walks a square map, two walk others. For two directions "one line" is many lines of one pixel.
SIZES = {
    "square": (5, 5), "tall": (6, 4), "wide": (3, 10), "one line": (1, 6), "long": (9, 50), "long square": (33, 33),
}  # fmt: skip
# A tile of 8 channels would not fit a short line of 8 channels, whose store would be contiguous.
TILES: dict[str, Any] = {
    "planned": None, "broad": Tile(16, 24, 1, 2, 1), "two": Tile(16, 16, 2, 3, 2), "single": Tile(16, 24, 1, 1, 1),
    "cut": Tile(16, 32, 1, 2, 1, ghost=4), "chunks": Tile(16, 16, 1, 2, 1, chunks=2),
}  # fmt: skip
# Maps that are given, and the variants of a low-rank propagation.
GIVEN = "given"
# Tiles whose matrix products and lines take turns; by default they overlap.
IN_TURN = {f"{name} in turn": dataclasses.replace(TILES[name], overlap=False) for name in ("two", "cut")}
AXES = {
    "variant": (GIVEN, *VARIANTS),
    "size": tuple(SIZES),
    "map": ((1, 8), (2, 9), (1, 24)),  # batch and channels
    "chunk": (None, 2),
    "sharing": ("none", "all", "three"),  # channels that share a weight
    "dtypes": ("float32", "bfloat16", "float16", "wide x"),  # of x and of the maps or the proxy
    "rank": (3, 40),
    "skip": (True, False),
    "tile": tuple(TILES),
}


class PropagationCase(NamedTuple):
    """One value of each axis, in their order."""

    variant: str
    size: str
    map: tuple[int, int]
    chunk: int | None
    sharing: str
    dtypes: str
    rank: int
    skip: bool
    tile: str

    def __str__(self) -> str:
        values = ("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in self)
        return "-".join(value.replace(" ", "_") for value in values)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.map[0], *SIZES[self.size], self.map[1]

    @property
    def is_low_rank(self) -> bool:
        return self.variant != GIVEN

    @property
    def is_on_chip(self) -> bool:
        return self.variant.endswith("on_chip")

    @property
    def is_long(self) -> bool:
        """Whether a line is cut into segments."""
        return self.size.startswith("long")

    @property
    def weight_channels(self) -> int:
        return {"none": self.map[1], "all": 1, "three": self.map[1] // 3}[self.sharing]

    @property
    def dtype_of_x(self) -> str:
        return "float32" if self.dtypes == "wide x" else self.dtypes

    @property
    def dtype_of_maps(self) -> str:
        return "bfloat16" if self.dtypes == "wide x" else self.dtypes

    @property
    def dtype_of_result(self) -> str:
        """The dtype that decides how exact y is and the gradient of x."""
        # XLA may leave out the rounding of gate and skip, which it makes and uses.
        return self.dtype_of_maps if self.is_low_rank and self.variant == "scans" else self.dtype_of_x

    @property
    def is_allowed(self) -> bool:
        """Whether the values go together, and the interpreter needs only seconds."""
        height, width = SIZES[self.size]
        made = self.is_low_rank
        return all((
            not (made and self.dtypes == "float32"),
            made or self.rank == 3,  # given maps have no proxy
            not self.is_on_chip or (1 < min(height, width) and not self.is_long),
            self.sharing != "three" or self.map[1] % 3 == 0,
            (self.tile == "cut") == self.is_long,
            # Extreme and expensive sizes only with few values of the other axes.
            self.size in ("square", "tall", "wide")
            or (self.rank == 3 and self.sharing == "none" and self.dtypes == ("wide x" if made else "float32")),
            self.size != "one line" or (self.tile == "planned" and self.map == (1, 24)),
            not self.is_long or self.map == (1, 8),
            self.size != "long square" or (self.chunk is None and self.skip),
            self.tile != "single" or self.is_on_chip,
            # A CTA's channels share one weight, where a kernel reads weights: these tiles are too broad.
            self.tile == "planned" or self.sharing != "all" or self.variant.startswith("low_rank"),
            self.tile != "chunks" or (self.chunk == 2 and self.map == (1, 8)),
            # Likewise expensive tiles, and float16, whose kernels differ from bfloat16's only in the dtype.
            self.tile not in ("two", "single")
            or (self.size == "square" and self.map == (1, 8) and self.dtypes in ("float32", "wide x")),
            self.dtypes != "float16" or (self.tile == "planned" and self.size == "square"),
            not self.is_on_chip or self.tile not in ("two", "cut", "chunks"),
        ))  # fmt: skip

    @property
    def cost(self) -> int:
        """About what the interpreter's time grows with."""
        height, width = SIZES[self.size]
        several = (5 if self.is_long else 1) * {"two": 3, "single": 2}.get(self.tile, 1)
        return self.map[0] * (height + width) * (2 if self.map[1] > 8 else 1) * several

    def arrays(self) -> list[Any]:
        """x, the maps or proxy and projections, merge, and the gradient that reaches y."""
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        pixels, channels, rank, made = self.shape[:3], self.shape[3], self.rank, self.is_low_rank
        front, scale = ((rank,), rank**-0.5) if made else (pixels, 1.0)
        logits = rng.normal(0, 2 * scale, (*front, 4, 3, self.weight_channels))
        maps: Any = [logits, *rng.normal(0, scale, (3, *front, 4, channels))]
        maps = [jnp.asarray(array, self.dtype_of_maps) for array in maps]
        maps[3] = maps[3] if self.skip else None
        proxy = [jnp.asarray(rng.normal(size=(*pixels, rank)), self.dtype_of_maps)] if made else []
        x, grad = (jnp.asarray(array, self.dtype_of_x) for array in rng.normal(size=(2, *self.shape)))
        merge = jnp.asarray(rng.normal(size=4), "float32")
        return [x, *proxy, *([UpProjection(*maps)] if made else maps), merge, grad]


@functools.cache
def product() -> tuple[PropagationCase, ...]:
    """Every allowed case."""
    return tuple(
        case for case in itertools.starmap(PropagationCase, itertools.product(*AXES.values())) if case.is_allowed
    )


@functools.cache
def covering() -> tuple[PropagationCase, ...]:
    """Cases in which every allowed pair of values occurs."""
    return covering_set(product(), AXES, [60 + case.cost for case in product()])


def inference() -> tuple[PropagationCase, ...]:
    """One covering case for each variant."""
    return tuple({case.variant: case for case in covering()}.values())


def backward_variant(case: PropagationCase) -> str | None:
    """The variant of a case that has its own backward kernel and one launch."""
    return case.variant if not case.is_on_chip and case.size == "square" else None


def on_chip_variant(case: PropagationCase) -> str | None:
    """The variant of a case, if its backward kernels are those of another variant."""
    return case.variant if case.is_on_chip else None


def compiled() -> tuple[PropagationCase, ...]:
    """One covering case for each variant and tile; a broad tile differs from the planned one only in its size."""
    return tuple({(case.variant, case.tile): case for case in covering() if case.tile != "broad"}.values())


def bound(case: PropagationCase, implementation: str) -> Any:
    """The operation of the case as a function of its arrays, without the gradient."""
    options: dict[str, Any] = dict(chunk=case.chunk, implementation=implementation)
    if not case.is_low_rank:
        return functools.partial(propagate, **options)
    if implementation == "xla":
        return functools.partial(_exact, **options)
    return functools.partial(propagate_low_rank, variant=case.variant, **options)


def _exact(x: jax.Array, proxy: jax.Array, up: UpProjection, merge: jax.Array, **options: Any) -> jax.Array:
    """y from maps of 16 bits, as the kernels make them; all else is float32, and rounded at the end."""
    # Without the barrier XLA may leave out the rounding of the maps.
    logits, lam, gate, skip = jax.lax.optimization_barrier(maps_of(proxy, up))
    return propagate(x.astype("float32"), logits, lam, gate, skip, merge, **options).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def y_and_gradients(case: PropagationCase, implementation: str, *arrays: Any) -> dict[str, jax.Array]:
    """y and the gradients by name; those that are None are left out."""
    *inputs, grad = arrays
    y, vjp = jax.vjp(bound(case, implementation), *inputs)
    if case.is_low_rank:
        x, proxy, up, merge = vjp(grad)
        found = dict(y=y, x=x, proxy=proxy, merge=merge, **up._asdict())
    else:
        names = ("x", "logits", "lam", "gate", "skip", "merge")
        found = dict(y=y, **dict(zip(names, vjp(grad), strict=True)))
    return {name: array for name, array in found.items() if array is not None}


def check(case: PropagationCase, implementation: str) -> None:
    """The results of `implementation` agree with the reference; races that the interpreter finds raise."""
    arrays = case.arrays()
    got, want = (y_and_gradients(case, name, *arrays) for name in (implementation, "xla"))
    assert got.keys() == want.keys()
    for name, reference in want.items():
        # Kernels round the gradients of maps to the maps' dtype. Those of the proxy, of a projection and of merge are
        # made from them, and two are rounded again.
        least = TOLERANCES[case.dtype_of_result if name in ("y", "x") else case.dtype_of_maps]
        least *= 2 if case.is_low_rank and name in ("proxy", "merge", *UpProjection._fields) else 1
        least *= 2 if name == "x" and case.variant == "scans" else 1  # rounded between its two parts
        if name == "merge":  # four sums over the whole map, which cancel
            least = max(least, 4 * TOLERANCES["float32"])
        assert_close(got[name], reference, tolerance=max(least, TOLERANCES[reference.dtype.name]), name=name)


def check_inference(case: PropagationCase, implementation: str) -> None:
    """As `check`, for y of a forward pass that keeps nothing for a gradient."""
    *inputs, _ = case.arrays()
    got, want = (jax.jit(bound(case, name))(*inputs) for name in (implementation, "xla"))
    assert_close(got, want, tolerance=TOLERANCES[case.dtype_of_result], name="y")
