"""The kernels' calls of Mosaic GPU. Calls whose signature changes between JAX versions are only in this file.

A warpgroup (128 threads) works on a tile of a line, (pixels, channels), in row-major order over its threads.
"""

import math
import threading
from collections.abc import Callable, Mapping
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

from pallas_kernels.mosaic.instructions import widen

THREADS = 128  # of a warpgroup
ALIGNMENT = 128  # bytes; a TMA copy starts at a multiple of it in shared memory
LARGEST_BOX = 256  # elements of a TMA copy along one axis

shared_memory = plgpu.SMEM
commit = plgpu.commit_smem  # makes results in shared memory visible to the whole warpgroup and to TMA
end_group = plgpu.commit_smem_to_gmem_group


def vector(rows: int, channels: int) -> int:
    """Consecutive elements of a (rows, channels) tile that a thread holds: at most 4, which is 16 bytes of float32."""
    return next(v for v in (4, 2, 1) if rows * channels % (THREADS * v) == 0)


def _layout(rows: int, channels: int) -> Any:
    """The layout of a (rows, channels) tile in registers: row-major over the threads, each with vectors of one row.

    It can be reduced over the channels.
    """
    v = vector(rows, channels)
    rows_of_warp = 32 * v // channels
    tiles = plgpu.Tiling(((4 * rows_of_warp, channels), (rows_of_warp, channels), (1, v)))
    # Warp and lane dimensions count from the end of the tiled axes. JAX accepts only the form without axes of length 1.
    tiled = fragmented_array.TiledLayout(
        tiles, warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1, _check_canonical=False
    ).canonicalize()
    make: Any = plgpu.Layout.TILED
    return make(tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim)


def load(ref: Any, *, is_part: bool = False, least: float | None = None) -> jax.Array:
    """A (rows, channels) tile from shared memory, as float32.

    Args:
        ref: the tile.
        is_part: whether it is part of a larger array, so that rows have gaps between them and banks may conflict.
        least: smaller values count as this one; in bfloat16 it takes half an instruction for each.
    """
    rows, channels = ref.shape
    found = plgpu.load(ref, layout=_layout(rows, channels), optimized=not is_part)
    return widen(found if least is None else jnp.maximum(found, least))


def load_pixels(ref: Any, channels: int) -> jax.Array:
    """(rows,) float32 values from shared memory, one for each row of a (rows, channels) tile."""
    (rows,) = ref.shape
    return plgpu.load(ref, layout=_layout(rows, channels).reduce(1))


def spread(values: jax.Array, channels: int) -> jax.Array:
    """(rows,) values as a (rows, channels) tile."""
    rows = values.shape[0]
    return plgpu.layout_cast(lax.broadcast_in_dim(values, (rows, channels), (0,)), _layout(rows, channels))


def zeros(rows: int, channels: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, channels), jnp.float32), _layout(rows, channels))


def pixels(rows: int, channels: int) -> jax.Array:
    """(rows, channels) int32: each element's row."""
    return plgpu.broadcasted_iota(jnp.int32, (rows, channels), 0, layout=_layout(rows, channels))


def pixel_numbers(rows: int, channels: int) -> jax.Array:
    """(rows,) int32: the row numbers of a (rows, channels) tile."""
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=_layout(rows, channels).reduce(1))


def clear(ref: Any) -> None:
    """Fills a (rows, channels) float32 array in shared memory with zeros; its size is a multiple of 128."""
    strided: Any = plgpu.Layout.WG_STRIDED
    rows, channels = ref.shape
    strided = strided(ref.shape, vec_size=vector(rows, channels))
    ref[...] = plgpu.layout_cast(jnp.zeros(ref.shape, jnp.float32), strided)


def barriers(arrivals: int, count: int = 1) -> Any:
    """`count` barriers, each complete after `arrivals` TMA copies have arrived, or warpgroups have called `meet`."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def wait(barrier: Any) -> None:
    plgpu.barrier_wait(barrier)


def meet(barrier: Any) -> None:
    """All warpgroups of the CTA wait for each other."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def factor(rows: int, columns: int, swizzle: int, dtype: Any, copies: int) -> Any:
    """Shared memory for `copies` factors of matrix products, in the order that tensor cores read; `dtype` is 16-bit."""
    size = jnp.dtype(dtype).itemsize
    tiling: Any = plgpu.TilingTransform
    swizzled: Any = plgpu.SwizzleTransform
    transforms = tiling((8, swizzle // size)), swizzled(swizzle)
    return plgpu.SMEM((copies, rows, columns), dtype, transforms=transforms)


def common_swizzle(*columns: int) -> int:
    """The swizzle (in bytes) that both factors of a product can have; `columns` are multiples of 16, of 16 bits."""
    return next(swizzle for swizzle in (128, 64, 32) if all(2 * count % swizzle == 0 for count in columns))


def multiply(left: Any, right: Any, result: Any, meanwhile: Callable[[], Any] = lambda: None) -> Any:
    """result = left @ right for refs (64 n, k), (k, m) and (64 n, m), summed in float32.

    Tensor cores work while `meanwhile()` runs, whose result is returned. Other threads see the product after `commit`,
    which must also come before either factor is overwritten.
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
    """Starts a TMA copy into shared memory, with zeros outside the array; `barrier` counts its arrival."""
    plgpu.copy_gmem_to_smem(source, target, barrier, oob_mode=plgpu.OOBFillMode.ZEROS)


def store(source: Any, target: Any) -> None:
    """Starts a TMA copy out of shared memory, clipped at the array's end; `end_group` closes its group."""
    plgpu.copy_smem_to_gmem(source, target, commit_group=False)


def wait_stored(groups: int) -> None:
    """Waits until all but the last `groups` groups of stores have been read from shared memory."""
    plgpu.wait_smem_to_gmem(groups, wait_read_only=True)


def wait_written() -> None:
    """Waits until all stores have arrived in device memory."""
    plgpu.wait_smem_to_gmem(0)


def launch(
    body: Callable[..., None],
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, Any],
    made: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    *,
    name: str,
    ctas: int,
    warpgroups: int,
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs a kernel with `ctas` CTAs.

    Args:
        body: body(refs, scratch) gets the refs of inputs, outputs and made arrays in one dictionary, and those of
            scratch in another, by their names. `lax.axis_index` of "cta" and "warpgroup" tells its place.
        inputs: arrays that it reads.
        outputs: refs (`jax.new_ref`) of existing arrays that it writes into.
        made: arrays that this launch creates.
        scratch: shared memory and barriers of a CTA.
        name: of the kernel in compiled programs and profiles.
        ctas: one axis, because CUDA's other two grid axes end at 65,535.
        warpgroups: of a CTA.
        interpret: whether the interpreter runs it, checking for races.

    Returns:
        The arrays `made`.
    """
    mesh = plgpu.Mesh(grid=(ctas,), grid_names=("cta",), num_threads=warpgroups, thread_name="warpgroup")

    def kernel(*given):
        refs = dict(zip((*inputs, *made), given, strict=True)) | dict(outputs)
        inside = lambda *arrays: body(refs, dict(zip(scratch, arrays, strict=True)))  # noqa: E731
        pl.run_scoped(inside, *scratch.values(), collective_axes="warpgroup")

    run: Any = pl.kernel(
        kernel,
        out_type=tuple(made.values()),
        mesh=mesh,
        # The kernels place the barriers within a warpgroup themselves: see Frame.walk.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
        name=name,
    )
    return dict(zip(made, run(*inputs.values()), strict=True))


class _RecordedRaces(GPURaceDetectionState):
    """The race detector's state of one kernel, collected in `seen`: the interpreter itself keeps only the last one."""

    seen: list["_RecordedRaces"] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen.append(self)


gpu_callbacks.GPURaceDetectionState = _RecordedRaces  # pyright: ignore[reportPrivateImportUsage]
_one_at_a_time = threading.Lock()


def interpreted(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function(*arrays)`, which launches kernels with `interpret`, as one callback to the host.

    The interpreter has one state for the whole process and uses ordered callbacks, which transformations such as
    `jax.checkpoint` refuse. Inside this callback kernels run one after the other, hidden from transformations.

    Raises:
        RuntimeError: when it runs, if the interpreter saw a race.
    """

    def run(*arrays):
        with _one_at_a_time:
            _RecordedRaces.seen.clear()
            try:
                # A caller's transfer guard is meant for the program, not for the interpreter.
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
    """`function(*arrays)`, which launches kernels, also inside a shard_map.

    Kernels do not declare over which axes of a shard_map their results vary, so JAX's check is off. Their integers have
    32 bits also under jax_enable_x64.
    """
    with config._check_vma(False), jax.enable_x64(False):
        return function(*arrays)


def round_up(count: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def full_stores(rows: int, channels: int) -> int:
    """The least number of rows, at least `rows`, whose elements divide evenly among 128 threads."""
    return round_up(rows, THREADS // math.gcd(THREADS, channels))


def margin(channels: int, dtype: Any) -> int:
    """The least number of pixels by which a copy can be shifted in shared memory: `ALIGNMENT` bytes."""
    return max(1, ALIGNMENT // (channels * jnp.dtype(dtype).itemsize))
