"""The Mosaic GPU calls of the kernels: every one whose signature moves between JAX versions is here and nowhere else.

A warpgroup, 128 threads, works on a tile of a line: (pixels, channels), row-major over its threads.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import config
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128  # of a warpgroup
ALIGNMENT = 128  # bytes: where in shared memory a TMA copy may start
LARGEST_BOX = 256  # elements along an axis of one TMA copy

shared_memory = plgpu.SMEM
commit = plgpu.commit_smem  # results in shared memory are there for the warpgroup and for TMA
end_group = plgpu.commit_smem_to_gmem_group


def vector(rows: int, channels: int) -> int:
    """Elements of a (rows, channels) tile that a thread holds next to each other: at most 4, 16 bytes of float32."""
    return next(v for v in (4, 2, 1) if rows * channels % (THREADS * v) == 0)


def _layout(rows: int, channels: int) -> Any:
    """Row-major over the threads of a warpgroup, each with vectors of one row: a form that can drop the channels."""
    v = vector(rows, channels)
    rows_of_warp = 32 * v // channels
    tiles = plgpu.Tiling(((4 * rows_of_warp, channels), (rows_of_warp, channels), (1, v)))
    # Warps and lanes by their place from the end of the axes that the tiles make; JAX takes the form without axes of
    # length 1.
    tiled = fragmented_array.TiledLayout(
        tiles, warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1, _check_canonical=False
    ).canonicalize()
    make: Any = plgpu.Layout.TILED
    return make(tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim)


def load(ref: Any, *, is_part: bool = False) -> jax.Array:
    """A (rows, channels) tile from shared memory, as float32.

    `is_part`: of a larger array, with other values between its rows, so that their banks may be the same.
    """
    rows, channels = ref.shape
    return plgpu.load(ref, layout=_layout(rows, channels), optimized=not is_part).astype(jnp.float32)


def load_pixels(ref: Any, channels: int) -> jax.Array:
    """One float32 value for each row of a (rows, channels) tile, from shared memory."""
    (rows,) = ref.shape
    return plgpu.load(ref, layout=_layout(rows, channels).reduce(1))


def spread(values: jax.Array, channels: int) -> jax.Array:
    """(rows,) values as a (rows, channels) tile."""
    rows = values.shape[0]
    return plgpu.layout_cast(lax.broadcast_in_dim(values, (rows, channels), (0,)), _layout(rows, channels))


def zeros(rows: int, channels: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, channels), jnp.float32), _layout(rows, channels))


def pixels(rows: int, channels: int) -> jax.Array:
    """(rows, channels) int32: the row of each element."""
    return plgpu.broadcasted_iota(jnp.int32, (rows, channels), 0, layout=_layout(rows, channels))


def pixel_numbers(rows: int, channels: int) -> jax.Array:
    """(rows,) int32: the rows of a (rows, channels) tile."""
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=_layout(rows, channels).reduce(1))


def clear(ref: Any) -> None:
    """Zeros in a (rows, channels) float32 array in shared memory, of a multiple of 128 elements."""
    strided: Any = plgpu.Layout.WG_STRIDED
    rows, channels = ref.shape
    strided = strided(ref.shape, vec_size=vector(rows, channels))
    ref[...] = plgpu.layout_cast(jnp.zeros(ref.shape, jnp.float32), strided)


class Blank:
    """An array of results, which launches fill one after the other, each its part; `[...]` is what they made of it.

    The first launch makes it. One that was there before would have no operands, and XLA gives such arrays their memory
    at the start of the program: those of all layers at once.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, interpret: bool):
        self.like = jax.ShapeDtypeStruct(tuple(shape), dtype)
        # The interpreter's starts as NaN, so that a place which no kernel writes shows.
        self.array: jax.Array | None = jnp.full(shape, jnp.nan, dtype) if interpret else None

    def __getitem__(self, _: Any) -> jax.Array:
        assert self.array is not None
        return self.array


def barriers(arrivals: int, count: int = 1) -> Any:
    """`count` barriers, each complete after `arrivals`: TMA copies that land, or warpgroups that call `meet`."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def wait(barrier: Any) -> None:
    plgpu.barrier_wait(barrier)


def meet(barrier: Any) -> None:
    """All warpgroups of the CTA wait for each other."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def factor(rows: int, columns: int, swizzle: int, dtype: Any, copies: int) -> Any:
    """Shared memory for `copies` factors of matrix products, in the order that tensor cores read; 16-bit dtypes."""
    size = jnp.dtype(dtype).itemsize
    tiling: Any = plgpu.TilingTransform
    swizzled: Any = plgpu.SwizzleTransform
    transforms = tiling((8, swizzle // size)), swizzled(swizzle)
    return plgpu.SMEM((copies, rows, columns), dtype, transforms=transforms)


def common_swizzle(*columns: int) -> int:
    """Bytes after which the order of both factors of a product repeats; their 16-bit columns in multiples of 16."""
    return next(swizzle for swizzle in (128, 64, 32) if all(2 * count % swizzle == 0 for count in columns))


def multiply(left: Any, right: Any, result: Any, meanwhile: Callable[[], Any] = lambda: None) -> Any:
    """result = left @ right of refs (64 n, k), (k, m) and (64 n, m): sums in float32, in the result's dtype.

    The result is there for others after `commit`, which must also come before either factor is overwritten. Tensor
    cores work while `meanwhile()` runs, whose result is returned.
    """

    def product(sums):
        plgpu.wgmma(sums, left, right)
        found = meanwhile()
        plgpu.wgmma_wait(0)
        result[...] = sums[...].astype(result.dtype)
        return found

    sums: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(product, sums((left.shape[0], right.shape[1]), jnp.float32))


def fetch(source: Any, target: Any, barrier: Any) -> None:
    """Starts a TMA copy into shared memory, with zeros where it leaves the array; `barrier` counts its arrival."""
    plgpu.copy_gmem_to_smem(source, target, barrier, oob_mode=plgpu.OOBFillMode.ZEROS)


def store(source: Any, target: Any) -> None:
    """Starts a TMA copy out of shared memory, clipped where it leaves the array; `end_group` closes the group of it."""
    plgpu.copy_smem_to_gmem(source, target, commit_group=False)


def wait_stored(groups: int) -> None:
    """Until all but the last `groups` groups have left shared memory."""
    plgpu.wait_smem_to_gmem(groups, wait_read_only=True)


def wait_written() -> None:
    """Until everything that was stored has arrived in memory."""
    plgpu.wait_smem_to_gmem(0)


def launch(
    body: Callable[..., None],
    inputs: Sequence[jax.Array],
    outputs: Sequence[Any],
    made: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    *,
    name: str,
    grid: dict[str, int],
    warpgroups: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs a kernel once for each point of `grid`.

    Args:
      body: called with the refs of inputs, outputs, made and scratch.
      inputs: arrays that it reads.
      outputs: refs (`jax.new_ref`) that it writes into, each launch its part.
      made: arrays that this launch returns.
      scratch: shared memory and barriers of a CTA.
      name: of the kernel in compiled programs and profiles.
      grid: axis names and sizes; `axis_index` of a name gives the place. "warpgroup" is added.
      warpgroups: that a CTA has.
      interpret: whether the interpreter runs it, watching for races.
    """
    mesh = plgpu.Mesh(
        grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=warpgroups, thread_name="warpgroup"
    )

    def kernel(*refs):
        taken, given = refs[: len(inputs)], refs[len(inputs) :]
        pl.run_scoped(functools.partial(body, *taken, *outputs, *given), *scratch, collective_axes="warpgroup")

    run: Any = pl.kernel(
        kernel,
        out_type=tuple(made),
        mesh=mesh,
        # The barriers that order the threads of a warpgroup are the kernels' own: see Pipeline.walk.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
        name=name,
    )
    return run(*inputs)


class _RecordedRaces(GPURaceDetectionState):
    """What the race detector saw of one kernel, kept until somebody asks: the interpreter keeps the last one only."""

    seen: list["_RecordedRaces"] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen.append(self)


gpu_callbacks.GPURaceDetectionState = _RecordedRaces  # pyright: ignore[reportPrivateImportUsage]
_one_at_a_time = threading.Lock()


def interpreted(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function(*arrays)`, which launches kernels with `interpret`, as one call to the host.

    The interpreter has one state for the whole process and callbacks that must keep their order, which
    transformations such as `jax.checkpoint` refuse; here kernels run one after the other and nobody sees inside.

    Raises:
      RuntimeError: when it runs, if the interpreter saw a race.
    """

    def run(*arrays):
        with _one_at_a_time:
            _RecordedRaces.seen.clear()
            try:
                # A caller who forbids transfers to devices means the program's, not the interpreter's.
                with jax.enable_x64(False), jax.transfer_guard("allow"):
                    results = jax.tree.map(np.asarray, jax.jit(function)(*arrays))
            except Exception:
                gpu_callbacks.reset_gpu_interpret_mode_state()
                raise
            if any(races.races_found for races in _RecordedRaces.seen):
                raise RuntimeError("the interpreter saw a race in a kernel; it printed the two places")
            return results

    with jax.enable_x64(False):
        results = jax.eval_shape(function, *arrays)
    return jax.pure_callback(run, results, *arrays, vmap_method="sequential")


def on_device(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function(*arrays)`, which launches kernels; also inside a shard_map.

    Kernels do not say over which axes of a shard_map their results vary, so that JAX must not ask. They count in 32
    bits whatever jax_enable_x64 says.
    """
    with config._check_vma(False), jax.enable_x64(False):
        return function(*arrays)


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def full_stores(rows: int, channels: int) -> int:
    """`rows`, or the next number of them that 128 threads fill."""
    return round_up(rows, THREADS // math.gcd(THREADS, channels))


def margin(channels: int, dtype: Any) -> int:
    """Pixels whose bytes are a multiple of `ALIGNMENT`: the least that a copy in shared memory can be moved by."""
    return max(1, ALIGNMENT // (channels * jnp.dtype(dtype).itemsize))
