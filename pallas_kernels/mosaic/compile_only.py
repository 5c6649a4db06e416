"""Compiles JAX functions for an NVIDIA H200 on a machine without one, and reads what their Mosaic kernels need.

Nothing is executed. Needs requirements-gpu-compile.txt and JAX_PLATFORMS=cpu: JAX then registers its CUDA plugin and
does not start it. Without a card XLA cannot tune matrix products and convolutions. The Mosaic kernels are those that
will run, and memory and fusions are close to them, but only a card shows how fast a matrix product is.

Every call of JAX's internals for this purpose is in this file. `compile_for_h200` sets an environment variable of the
process while it compiles: make one call at a time.
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

from pallas_kernels.mosaic import card, machine_code
from pallas_kernels.mosaic.card import H200
from pallas_kernels.mosaic.machine_code import MachineCode

REQUIREMENTS = "requirements-gpu-compile.txt"
_SHARED_MEMORY_PER_MULTIPROCESSOR = 233472  # bytes
_RESERVED_SHARED_MEMORY = 1024  # bytes that the driver takes for every CTA
_REGISTERS_PER_QUARTER = 16384  # a multiprocessor has four, and a warp lives in one of them
_THREADS_PER_MULTIPROCESSOR = 2048
_CTAS_PER_MULTIPROCESSOR = 32

# What XLA asks of a card, as an H200 answers it.
_TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {_SHARED_MEMORY_PER_MULTIPROCESSOR}
  threads_per_core_limit: {_THREADS_PER_MULTIPROCESSOR}
  core_count: {H200.multiprocessors}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4917000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: {H200.shared_memory}
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: {4 * _REGISTERS_PER_QUARTER}
  registers_per_block_limit: {4 * _REGISTERS_PER_QUARTER}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 1 }}
device_description_str: "{H200.name}"
"""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the compiled program starts a kernel."""

    name: str
    module: str  # unique in the process: compiled again, the same kernel gets another
    grid: tuple[int, int, int]  # CTAs
    threads: int  # per CTA
    dynamic_shared_memory: int  # bytes per CTA: buffers and barriers


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a Mosaic kernel needs, from the assembler's report and its machine code (SASS)."""

    name: str
    grid: tuple[int, int, int]  # CTAs
    threads: int  # per CTA
    registers: int  # per thread
    spill_bytes: int  # per thread, stored and loaded
    stack_bytes: int  # per thread
    shared_memory: int  # bytes per CTA: buffers, barriers and the assembler's own
    code: MachineCode = dataclasses.field(repr=False)

    @property
    def ctas(self) -> int:
        x, y, z = self.grid
        return x * y * z

    @property
    def ctas_per_multiprocessor(self) -> int:
        """CTAs that a multiprocessor holds at once, by arithmetic; 0 for a kernel that cannot run."""
        if self.shared_memory > H200.shared_memory:
            return 0
        warps = -(-self.threads // 32)
        warps_of_quarter = _REGISTERS_PER_QUARTER // (-(-max(self.registers, 1) // 8) * 8 * 32)
        shared = -(-(self.shared_memory + _RESERVED_SHARED_MEMORY) // 128) * 128
        return min(
            4 * warps_of_quarter // warps,
            _SHARED_MEMORY_PER_MULTIPROCESSOR // shared,
            _THREADS_PER_MULTIPROCESSOR // (32 * warps),
            _CTAS_PER_MULTIPROCESSOR,
        )

    @property
    def opcodes(self) -> Mapping[str, int]:
        """How often each opcode is in the machine code, with modifiers: UTMALDG.4D, LDS.128."""
        return self.code.opcodes

    def count(self, opcode: str) -> int:
        """Counts the instructions whose opcode begins with the dotted parts of `opcode`: LDS, LDS.128."""
        return sum(number for name, number in self.opcodes.items() if f"{name}.".startswith(f"{opcode}."))


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A program for an H200. `compiled` cannot run here; its memory_analysis() and as_text() work."""

    compiled: jax.stages.Compiled
    kernels: tuple[Kernel, ...]  # each different one once, in the order of the program's text


def missing() -> str | None:
    """Says what this machine lacks to compile for an H200, or returns None."""
    absent = [name for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt") if name not in _installed()]
    absent += [name for name in ("ptxas", "nvdisasm") if not _tool(name).exists()]
    if absent:
        return f"{', '.join(absent)} missing: pip install --no-deps -r {REQUIREMENTS}"
    return None


@functools.cache
def _installed() -> frozenset[str]:
    names = (dist.metadata["Name"] for dist in importlib.metadata.distributions())
    return frozenset(name.lower().replace("_", "-") for name in names)


def assembler_version() -> str:
    """Returns the version of ptxas, such as 13.5.37."""
    answer = subprocess.run([_tool("ptxas"), "--version"], capture_output=True, text=True, check=True)
    return answer.stdout.rpartition(", V")[2].split()[0]


def _tool(name: str) -> pathlib.Path:
    """Returns the path of the CUDA program that JAX and Mosaic would call."""
    return pathlib.Path(jax_lib.cuda_path or os.devnull, "bin", name)


@contextlib.contextmanager
def h200() -> Iterator[None]:
    """Makes functions that are traced in the block plan for an H200, whatever this machine has."""
    device = jax.sharding.AbstractDevice(device_kind=H200.name, num_cores=H200.multiprocessors, platform="gpu")
    # One place of a mesh, whose only use is to carry the device: Pallas looks for it there.
    mesh = jax.sharding.AbstractMesh((1,), ("h200",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), card.assume(H200):
        yield


def compile_for_h200(function: Callable, *args: Any, **jit_options: Any) -> Compilation:
    """Compiles `jax.jit(function, **jit_options)` for arguments with the shapes and dtypes of `args`.

    Args:
        function: is traced once.
        args: trees of arrays or of jax.ShapeDtypeStruct.
        jit_options: options of jax.jit, such as donate_argnums.

    Returns:
        The compiled program and the resources of its Mosaic kernels.

    Raises:
        RuntimeError: something is `missing()`, JAX_PLATFORMS is not cpu, or Mosaic's reports have another format.
        Exception: whatever tracing, Mosaic, ptxas or XLA raise about the function.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    try:
        topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=_TARGET)
    except NotImplementedError as error:
        # Where JAX may use a GPU and finds no libraries to run on one, it gives up the whole plugin.
        raise RuntimeError("JAX did not register its CUDA plugin: set JAX_PLATFORMS=cpu") from error
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with h200():
        lowered = jax.jit(function, **jit_options).trace(*placed).lower(lowering_platforms=("cuda",))
    with tempfile.TemporaryDirectory() as folder:
        reports = pathlib.Path(folder)
        for module in {launch.module for launch in _launches(lowered.as_text())}:
            # Mosaic always writes the compiler's passes, up to 100 MB for one kernel.
            (reports / f"{module}.mlir-passes.log").symlink_to(os.devnull)
        # A program from a cache would bring no reports.
        with _environment("MOSAIC_GPU_DUMP_TO", folder), jax_config.enable_compilation_cache(False):
            compiled = lowered.compile()
        kernels = []
        for launch in _launches(compiled.as_text()):
            kernel = _kernel(launch, reports)
            if kernel not in kernels:
                kernels.append(kernel)
    return Compilation(compiled, tuple(kernels))


def kernel_counts(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Counts the launches of each Mosaic kernel in the compiled program, by name. The body of a loop counts once."""
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
    """Reads the launches of Mosaic kernels from StableHLO or optimised HLO. Each call carries its module."""
    calls = [line for line in (program or "").split("\n") if "mosaic_gpu_v2" in line and "module = " in line]
    modules = [re.findall(r'module = "((?:[^"\\]|\\.)*)"', call)[-1] for call in calls]
    return [_read_launch(module) for module in modules]


def _unescape(text: str) -> bytes:
    """Returns the bytes of an attribute that MLIR printed: backslashes are doubled or lead two hexadecimal digits."""

    def decoded(found: re.Match[str]) -> str:
        return bytes.fromhex(found[1].replace("\\", "")).decode("latin-1") if found[1] else "\\"

    return re.sub(r"\\\\|((?:\\[0-9A-Fa-f]{2})+)", decoded, text).encode("latin-1")


@functools.lru_cache(maxsize=16)  # the same modules are in a program before it is compiled and after
def _read_launch(text: str) -> Launch:
    """Reads the launch of a module from the attribute of a call."""
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
        return Kernel(
            name=launch.name,
            grid=launch.grid,
            threads=launch.threads,
            registers=_number(r"Used (\d+) registers", assembler),
            spill_bytes=_number(r"(\d+) bytes spill stores", assembler)
            + _number(r"(\d+) bytes spill loads", assembler),
            stack_bytes=_number(r"(\d+) bytes stack frame", assembler),
            shared_memory=launch.dynamic_shared_memory + _number(r"(\d+) bytes smem", assembler, default=0),
            code=machine_code.parse(disassembly),
        )
    except (OSError, LookupError) as error:
        raise RuntimeError(f"{launch.name}: Mosaic's reports have another format in this version: {error}") from error


def _number(pattern: str, text: str, default: int | None = None) -> int:
    found = re.search(pattern, text)
    if found is None and default is None:
        raise LookupError(f"no {pattern!r} in the assembler's report")
    return int(found[1]) if found is not None else int(default or 0)
