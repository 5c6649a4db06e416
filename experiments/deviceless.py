"""Compiles JAX functions for an NVIDIA H200 on a machine without one, and reads the resources of their Mosaic kernels.

Nothing is executed. Needs requirements-gpu-compile.txt and JAX_PLATFORMS=cpu: then JAX registers its CUDA plugin and
does not start it. Without a card XLA cannot tune matrix products and convolutions: the kernels written here are those
that will run, and memory and fusions are near, but how fast a matrix product is shows on a card alone.

Every call of JAX's internals for this purpose is in this file. `compile_for_h200` sets an environment variable of the
process while it compiles: one call at a time.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import config as jax_config
from jax._src import lib as jax_lib
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax.experimental import topologies

from experiments import machine_code
from pallas_kernels.mosaic import card

REQUIREMENTS = "requirements-gpu-compile.txt"
DEVICE_KIND = "NVIDIA H200"
MULTIPROCESSORS = 132
SHARED_MEMORY_PER_CTA = 232448  # bytes that a CTA may have: 227 KB
SHARED_MEMORY_PER_MULTIPROCESSOR = 233472
_RESERVED_SHARED_MEMORY = 1024  # bytes that the driver takes of every CTA
_REGISTERS_PER_QUARTER = 16384  # a multiprocessor has four, and a warp lives in one of them
_THREADS_PER_MULTIPROCESSOR = 2048
_CTAS_PER_MULTIPROCESSOR = 32

# What XLA asks of a card, as an H200 answers it.
_TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {SHARED_MEMORY_PER_MULTIPROCESSOR}
  threads_per_core_limit: {_THREADS_PER_MULTIPROCESSOR}
  core_count: {MULTIPROCESSORS}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4917000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: {SHARED_MEMORY_PER_CTA}
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: {4 * _REGISTERS_PER_QUARTER}
  registers_per_block_limit: {4 * _REGISTERS_PER_QUARTER}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 1 }}
device_description_str: "{DEVICE_KIND}"
"""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is started, as its launch in the compiled program says."""

    name: str
    module: str  # of the process alone: the same kernel compiled again has another
    grid: tuple[int, int, int]  # CTAs
    threads: int  # of a CTA
    dynamic_shared_memory: int  # bytes of a CTA: buffers and barriers


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a Mosaic kernel takes of the card, by the assembler's report and its machine code (SASS)."""

    name: str
    grid: tuple[int, int, int]  # CTAs
    threads: int  # of a CTA
    registers: int  # of a thread
    spill_bytes: int  # of a thread, stored and loaded
    stack_bytes: int  # of a thread
    shared_memory: int  # bytes of a CTA, buffers and barriers and the assembler's own
    opcodes: Mapping[str, int]  # of the whole kernel, with their modifiers: UTMALDG.4D, LDS.128
    loop_opcodes: Mapping[str, int]  # of the innermost loops that store results by TMA; empty without one
    product_opcodes: Mapping[str, int]  # of these, the part with tensor cores, where a branch may skip it

    @property
    def ctas(self) -> int:
        x, y, z = self.grid
        return x * y * z

    @property
    def ctas_per_multiprocessor(self) -> int:
        """CTAs that a multiprocessor holds at once; 0 for a kernel that cannot run. Arithmetic, not asked of a card."""
        if self.shared_memory > SHARED_MEMORY_PER_CTA:
            return 0
        warps = -(-self.threads // 32)
        warps_of_quarter = _REGISTERS_PER_QUARTER // (-(-max(self.registers, 1) // 8) * 8 * 32)
        shared = -(-(self.shared_memory + _RESERVED_SHARED_MEMORY) // 128) * 128
        return min(
            4 * warps_of_quarter // warps,
            SHARED_MEMORY_PER_MULTIPROCESSOR // shared,
            _THREADS_PER_MULTIPROCESSOR // (32 * warps),
            _CTAS_PER_MULTIPROCESSOR,
        )

    @property
    def groups_of_loop(self) -> int:
        """Groups of TMA stores that one round of all loops closes: the lines that `loop_opcodes` are for.

        More than the source says where a loop is unrolled.
        """
        return self.loop_opcodes.get("UTMACMDFLUSH", 0)

    def count(self, opcode: str) -> int:
        """Instructions in the kernel whose opcode begins with the dotted parts of `opcode`: LDS, LDS.128."""
        return sum(number for name, number in self.opcodes.items() if f"{name}.".startswith(f"{opcode}."))


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A program for an H200. `compiled` cannot be called here; memory_analysis() and as_text() are answered."""

    compiled: jax.stages.Compiled
    kernels: tuple[Kernel, ...]  # the different ones, in the order of the program's text


def missing() -> str | None:
    """Why nothing can be compiled for an H200 here, or None if it can."""
    absent = [name for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt") if name not in _installed()]
    absent += [name for name in ("ptxas", "nvdisasm") if not _tool(name).exists()]
    if absent:
        return f"{', '.join(absent)} missing here: pip install --no-deps -r {REQUIREMENTS}"
    return None


@functools.cache
def _installed() -> frozenset[str]:
    names = (dist.metadata["Name"] for dist in importlib.metadata.distributions())
    return frozenset(name.lower().replace("_", "-") for name in names)


def assembler_version() -> str:
    """Of ptxas, such as 13.5.37."""
    answer = subprocess.run([_tool("ptxas"), "--version"], capture_output=True, text=True, check=True)
    return answer.stdout.rpartition(", V")[2].split()[0]


def _tool(name: str) -> pathlib.Path:
    """The CUDA program that JAX and Mosaic would call."""
    return pathlib.Path(jax_lib.cuda_path or os.devnull, "bin", name)


@contextlib.contextmanager
def h200() -> Iterator[None]:
    """Functions traced in this block are for an H200, whatever is here."""
    device = jax.sharding.AbstractDevice(device_kind=DEVICE_KIND, num_cores=MULTIPROCESSORS, platform="gpu")
    # One place of a mesh, whose only use is to carry the device: Pallas looks for it there.
    mesh = jax.sharding.AbstractMesh((1,), ("h200",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), card.assume(card.H200):
        yield


def compile_for_h200(function: Callable, *args: Any, **jit_options: Any) -> Compilation:
    """Compiles `jax.jit(function, **jit_options)` for arguments with the shapes and dtypes of `args`.

    Args:
      function: traced once.
      args: trees of arrays or of jax.ShapeDtypeStruct.
      jit_options: of jax.jit, such as donate_argnums.

    Raises:
      RuntimeError: with `missing()`, without JAX_PLATFORMS=cpu, or for reports that are not as this file expects.
      Exception: whatever tracing, Mosaic, ptxas or XLA raise about the function.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    try:
        topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=_TARGET)
    except NotImplementedError as error:
        # Where JAX may use a GPU and finds no libraries to run on one, it gives the whole plugin up.
        raise RuntimeError("JAX did not register its CUDA plugin: set JAX_PLATFORMS=cpu") from error
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with h200():
        lowered = jax.jit(function, **jit_options).trace(*placed).lower(lowering_platforms=("cuda",))
    with tempfile.TemporaryDirectory() as folder:
        reports = pathlib.Path(folder)
        for module in {launch.module for launch in _launches(lowered.as_text())}:
            # The compiler's passes, up to 100 MB for one kernel, and nothing turns off that they are written.
            (reports / f"{module}.mlir-passes.log").symlink_to(os.devnull)
        # A program that came from a cache would bring no reports.
        with _environment("MOSAIC_GPU_DUMP_TO", folder), jax_config.enable_compilation_cache(False):
            compiled = lowered.compile()
        kernels = []
        for launch in _launches(compiled.as_text()):
            kernel = _kernel(launch, reports)
            if kernel not in kernels:
                kernels.append(kernel)
    return Compilation(compiled, tuple(kernels))


def kernel_counts(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How often each Mosaic kernel is in the compiled program, by name. The body of a loop counts once."""
    return dict(collections.Counter(launch.name for launch in _launches(compiled.as_text())))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _launches(program: str | None) -> list[Launch]:
    """The launches of Mosaic kernels in a program's text, StableHLO or optimised HLO. Each call carries its module."""
    calls = [line for line in (program or "").split("\n") if "mosaic_gpu_v2" in line and "module = " in line]
    modules = [re.findall(r'module = "((?:[^"\\]|\\.)*)"', call)[-1] for call in calls]
    return [_read_launch(module) for module in modules]


def _unescape(text: str) -> bytes:
    """The bytes of an attribute that MLIR printed: a backslash is doubled, or leads two hexadecimal digits."""

    def decoded(found: re.Match[str]) -> str:
        return bytes.fromhex(found[1].replace("\\", "")).decode("latin-1") if found[1] else "\\"

    return re.sub(r"\\\\|((?:\\[0-9A-Fa-f]{2})+)", decoded, text).encode("latin-1")


@functools.lru_cache(maxsize=16)  # the same modules are in a program before it is compiled and after
def _read_launch(text: str) -> Launch:
    """Of a module, as an attribute of a call holds it."""
    with mlir.make_ir_context() as context:
        context.allow_unregistered_dialects = True
        mosaic_gpu_dialect.register_dialect(context)
        module = ir.Module.parse(_unescape(text))
        attributes = module.operation.attributes
        launches: list[Any] = []

        def visit(operation: Any) -> Any:
            launches.extend([operation] if operation.name.endswith("gpu.launch") else [])
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)
        (launch,) = launches
        # Operands: a token, the grid, the block, the cluster where there is one, the dynamic shared memory.
        x, y, z, *block = (_constant(operand) for operand in list(launch.operands)[1:7])
        return Launch(
            name=ir.StringAttr(attributes["sym_name"]).value,
            module=ir.StringAttr(attributes["mosaic_gpu.dump_basename"]).value,
            grid=(x, y, z),
            threads=block[0] * block[1] * block[2],
            dynamic_shared_memory=_constant(list(launch.operands)[-1]),
        )


def _constant(value: Any) -> int:
    return ir.IntegerAttr(value.owner.attributes["value"]).value


def _kernel(launch: Launch, reports: pathlib.Path) -> Kernel:
    try:
        assembler = (reports / f"{launch.module}.ptxas").read_text()
        disassembly = (reports / f"{launch.module}.sass_ctrl").read_text()
        opcodes = machine_code.count_opcodes(disassembly)
        return Kernel(
            name=launch.name,
            grid=launch.grid,
            threads=launch.threads,
            registers=_number(r"Used (\d+) registers", assembler),
            spill_bytes=_number(r"(\d+) bytes spill stores", assembler)
            + _number(r"(\d+) bytes spill loads", assembler),
            stack_bytes=_number(r"(\d+) bytes stack frame", assembler),
            shared_memory=launch.dynamic_shared_memory + _number(r"(\d+) bytes smem", assembler, default=0),
            opcodes=opcodes.whole,
            loop_opcodes=opcodes.loop,
            product_opcodes=opcodes.product,
        )
    except (OSError, LookupError) as error:
        raise RuntimeError(f"{launch.name}: the reports of this version of Mosaic are other ones: {error}") from error


def _number(pattern: str, text: str, default: int | None = None) -> int:
    found = re.search(pattern, text)
    if found is None and default is None:
        raise LookupError(f"no {pattern!r} in the assembler's report")
    return int(found[1]) if found is not None else int(default or 0)
