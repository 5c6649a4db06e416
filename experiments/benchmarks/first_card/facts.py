"""What the machine is: the card and its software, how fast it copies, and how fast TMA alone copies."""

import contextlib
import functools
import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from experiments.benchmarks import device_time
from experiments.benchmarks.first_card.context import Context
from experiments.benchmarks.measurement import COPIED_BYTES
from pallas_kernels.mosaic import card, compile_only, primitives

ASKED = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "memory.used", "memory.total", "ecc.mode.current", "clocks_throttle_reasons.active",
)  # fmt: skip
DEVICE = ("device_kind", "compute_capability", "core_count", "shared_memory_per_block_optin")
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "numpy", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13")
ROWS, STAGES = 128, 4  # of the TMA copy: pixels of a box, boxes on their way


def facts(context: Context) -> None:
    """Writes the facts, and the rates of large copies."""
    device: Any = jax.devices()[0]
    about = {name: str(getattr(device, name, None)) for name in DEVICE}
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    tools = {name: _answer(name, "--version")[-1:] for name in ("nvcc", "compute-sanitizer")}
    with contextlib.suppress(OSError):
        tools["ptxas"] = [compile_only.assembler_version()]
    context.write(
        {"kind": "facts", "python": platform.python_version()} | about | {"versions": versions, "tools": tools}
    )
    context.write({"kind": "clocks", "when": "idle"} | _clocks())
    search = context.search()
    x = jnp.ones((2**12 if context.dry else COPIED_BYTES) // 4)
    for name, function in (("copy", jnp.copy), ("double", lambda x: 2 * x)):
        program = jax.jit(function).lower(x).compile()
        how: Any = dict(clock=search.clock, seconds=0.0 if context.dry else 2.0, most_runs=1000)
        timing = device_time.measure(lambda _, program=program: program(x), **how)
        milliseconds = timing.host_ms if timing.median_ms is None else timing.median_ms
        context.write(_copy_row(name, milliseconds, 2 * x.nbytes))
        context.write({"kind": "clocks", "when": f"after {name}"} | _clocks())


def copies(context: Context) -> None:
    """Times kernels that only copy, by TMA, in boxes of 8 to 64 channels; raises RuntimeError if a copy is wrong."""
    search = context.search()
    pixels, width, lines = (6 * ROWS, 64, 6) if context.dry else (2048 * ROWS, 1024, 64)
    x = (jnp.arange(pixels * width, dtype=jnp.uint32) % 256).astype(jnp.bfloat16).reshape(pixels, width)
    for channels in (32, 64) if context.dry else (8, 16, 32, 64):
        copy = functools.partial(tma_copy, channels=channels, lines=lines, interpret=context.dry)
        run = primitives.interpreted if context.dry else primitives.on_device
        program = jax.jit(functools.partial(run, copy)).lower(x).compile()
        if not bool(jnp.array_equal(program(x), x)):
            raise RuntimeError(f"the TMA copy of {channels} channels is wrong")
        if context.dry:
            continue
        timing = device_time.measure(lambda _, program=program: program(x), clock=search.clock)
        milliseconds = timing.host_ms if timing.median_ms is None else timing.median_ms
        rows = 2 * x.size // channels
        each = 1e6 * milliseconds * card.planned_for().multiprocessors / rows
        context.write(_copy_row(f"tma {channels}", milliseconds, 2 * x.nbytes) | {"ns_per_row_of_multiprocessor": each})


def tma_copy(x: jax.Array, *, channels: int, lines: int, interpret: bool) -> jax.Array:
    """Returns a copy of x, (pixels, C), made as the kernels move maps: `lines` boxes (ROWS, channels) a CTA."""
    pixels, width = x.shape
    blocks = width // channels

    def body(refs: dict[str, Any], scratch: dict[str, Any]) -> None:
        ring, arrived = scratch["ring"], scratch["arrived"]
        cta = lax.axis_index("cta")
        first, block = lax.div(cta, blocks) * lines, pl.ds(lax.rem(cta, blocks) * channels, channels)

        def box(ref: Any, line: Any) -> Any:
            return ref.at[pl.ds((first + line) * ROWS, ROWS), block]

        def fetch(line: Any) -> None:
            slot = lax.rem(line, STAGES)
            primitives.fetch(box(refs["x"], line), ring.at[slot], arrived.at[slot])

        def step(line: Any, carry: Any) -> Any:
            slot = lax.rem(line, STAGES)
            primitives.wait(arrived.at[slot])
            primitives.store(ring.at[slot], box(refs["copy"], line))
            primitives.end_group()
            # The slot of the line before is free as soon as its store has read it.
            primitives.wait_stored(1)
            pl.when((line > 0) & (line + STAGES - 1 < lines))(lambda: fetch(line + STAGES - 1))
            return carry

        for line in range(STAGES):
            fetch(jnp.int32(line))
        lax.fori_loop(0, lines, step, ())
        primitives.wait_written()

    ring = primitives.shared_memory((STAGES, ROWS, channels), x.dtype)
    return primitives.launch(
        body, {"x": x}, {}, {"copy": jax.ShapeDtypeStruct(x.shape, x.dtype)},
        {"ring": ring, "arrived": primitives.barriers(1, STAGES)},
        name=f"tma_copy_{channels}", ctas=pixels // (ROWS * lines) * blocks, warpgroups=1, interpret=interpret,
    )["copy"]  # fmt: skip


def _copy_row(name: str, milliseconds: float, moved: int) -> dict[str, Any]:
    return {"kind": "copy", "copy": name, "milliseconds": milliseconds, "gb_per_s": moved / milliseconds / 1e6}


def _clocks() -> dict[str, str]:
    answer = _answer("nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader")
    return dict(zip(ASKED, (word.strip() for word in answer[0].split(",")), strict=False)) if answer else {}


def _answer(program: str, *words: str) -> list[str]:
    """Returns the lines that a program prints; none if it is missing or fails."""
    found = shutil.which(program)
    if found is None:
        return []
    answer = subprocess.run([found, *words], capture_output=True, text=True, timeout=20)
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
