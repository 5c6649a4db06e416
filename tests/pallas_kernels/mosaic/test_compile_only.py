import dataclasses
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import compile_only
from pallas_kernels.mosaic.compile_only import Kernel, compile_for_h200, kernel_counts
from pallas_kernels.mosaic.machine_code import parse

compiles = pytest.mark.skipif(compile_only.missing() is not None, reason=str(compile_only.missing()))

OPCODES = ("LDS.128", "LDS.U16", "LDS.128", "LDSM", "LDS.128")
CODE = parse("\n".join(f"   -:-:-:Y:04    /*{16 * n:04x}*/    {opcode} R0, [R1] ;" for n, opcode in enumerate(OPCODES)))
KERNEL = Kernel("a", (9, 1, 128), 128, 72, 0, 0, 54313, CODE)


def test_the_internals_of_jax_are_where_they_are_expected():
    """Where this fails, pallas_kernels/mosaic/compile_only.py has to follow a new release of JAX."""
    assert hasattr(compile_only.jax_lib, "cuda_path")
    assert callable(compile_only.mosaic_gpu_dialect.register_dialect)
    with compile_only.jax_config.enable_compilation_cache(False):
        assert not compile_only.jax_config.enable_compilation_cache.value
    with compile_only.mlir.make_ir_context():
        module = compile_only.ir.Module.parse("module @named {}")
        assert compile_only.ir.StringAttr(module.operation.attributes["sym_name"]).value == "named"


@pytest.mark.parametrize(
    "changes, ctas",
    [
        ({}, 4),  # shared memory: 233472 / (54313 + 1024, rounded up to 128)
        ({"shared_memory": 1}, 7),  # registers: 16384 // (72 * 32) warps in each quarter
        ({"shared_memory": 1, "registers": 255}, 2),
        ({"shared_memory": 1, "registers": 255, "threads": 512}, 0),
        ({"shared_memory": 1, "registers": 16, "threads": 1024}, 2),
        ({"shared_memory": 1, "registers": 16, "threads": 32}, 32),
        ({"shared_memory": 232448}, 1),
        ({"shared_memory": 232449}, 0),
    ],
)
def test_ctas_of_a_multiprocessor(changes, ctas):
    assert dataclasses.replace(KERNEL, **changes).ctas_per_multiprocessor == ctas


def test_counts_and_grid_of_a_kernel():
    assert [KERNEL.count(opcode) for opcode in ("LDS", "LDS.128", "LDSM", "ST")] == [4, 3, 1, 0]
    assert KERNEL.ctas == 9 * 128


def test_missing_requirements_are_named(monkeypatch):
    monkeypatch.setattr(compile_only.jax_lib, "cuda_path", None)
    with pytest.raises(RuntimeError, match="ptxas, nvdisasm missing: .*requirements-gpu-compile.txt"):
        compile_for_h200(jnp.sin, jnp.zeros(1))


def twice(x: jax.Array, block: int = 128, spare: int = 0) -> jax.Array:
    """2 x of an (N, C) array: each CTA doubles `block` columns, four rows at a time, and wastes `spare` bytes."""

    def doubled(x_ref, out_ref, row, _, arrived):
        columns = pl.ds(jax.lax.axis_index("block") * block, block)

        def walk(n, carry):
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(4 * n, 4), columns], row, arrived)
            plgpu.barrier_wait(arrived)
            row[...] = row[...] * 2
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(row, out_ref.at[pl.ds(4 * n, 4), columns])
            plgpu.wait_smem_to_gmem(0)
            return carry

        jax.lax.fori_loop(0, x.shape[0] // 4, walk, None)

    scratch = [plgpu.SMEM((4, block), x.dtype), plgpu.SMEM((spare or 8,), jnp.int8), plgpu.Barrier()]
    return plgpu.kernel(doubled, out_type=x, scratch_types=scratch, grid=(x.shape[1] // block,), grid_names=("block",))(
        x
    )


@compiles
def test_resources_of_a_kernel():
    (kernel,) = compile_for_h200(twice, jnp.zeros((64, 512))).kernels
    assert kernel.name == "doubled" and kernel.threads == 128 and sorted(kernel.grid) == [1, 1, 4]
    # The row, 8 spare bytes rounded up to a place for the barrier, and the barrier; the assembler adds a byte.
    assert 4 * 128 * 4 + 8 + 8 <= kernel.shared_memory <= 4 * 128 * 4 + 2048 + 8 + 1
    assert 8 < kernel.registers < 64 and kernel.spill_bytes == kernel.stack_bytes == 0
    assert kernel.ctas_per_multiprocessor == 16
    assert kernel.count("UTMALDG") >= 1 and kernel.count("UTMASTG") >= 1
    (per_line,) = (n for part, n in kernel.code.executed((1,)).items() if part.startswith("loop"))
    assert 0 < per_line < len(kernel.code.instructions)


@compiles
def test_too_much_shared_memory_is_refused():
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        compile_for_h200(lambda x: twice(x, spare=227 * 1024), jnp.zeros((8, 128)))


@compiles
def test_a_train_step_with_kernels_in_it(monkeypatch):
    """Several kernels in one program, under matrix products and in a loop, and nothing left behind."""
    monkeypatch.delenv("MOSAIC_GPU_DUMP_TO", raising=False)

    def loss(params, x):
        h = jax.lax.fori_loop(0, 3, lambda _, h: twice(h, 128), x @ jax.lax.stop_gradient(params))
        return jnp.sum(twice(twice(h, 256), 256) * (x @ params))

    def step(params, x):
        return params - 0.1 * jax.grad(loss)(params, x)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 512), (64, 512))]
    compilation = compile_for_h200(step, *arrays, donate_argnums=0)
    assert kernel_counts(compilation.compiled) == {"doubled": 3}  # the body of the loop counts once
    assert sorted(kernel.ctas for kernel in compilation.kernels) == [2, 4]
    memory = compilation.compiled.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == 4 * 512 * 512
    assert "MOSAIC_GPU_DUMP_TO" not in os.environ


@compiles
def test_a_program_without_kernels():
    compilation = compile_for_h200(lambda x: {"a": jnp.sin(x["b"])}, {"b": jnp.zeros(3)})
    assert compilation.kernels == () and kernel_counts(compilation.compiled) == {}


@compiles
def test_version_of_the_assembler():
    assert compile_only.assembler_version().count(".") == 2


@compiles
def test_spills_are_counted():
    """Five tiles of 64 x 128 values, all needed at the end: 320 registers of 255."""

    def held(x_ref, out_ref, tiles, arrived):
        plgpu.copy_gmem_to_smem(x_ref, tiles, arrived)
        plgpu.barrier_wait(arrived)
        values = [tiles[k] for k in range(5)]
        plgpu.commit_smem()
        for k in range(5):
            tiles[k] = values[k] * values[k - 1]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tiles, out_ref)
        plgpu.wait_smem_to_gmem(0)

    x = jax.ShapeDtypeStruct((5, 64, 128), jnp.float32)
    function = plgpu.kernel(held, out_type=x, scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()])
    (kernel,) = compile_for_h200(function, x).kernels
    assert kernel.spill_bytes > 0 and kernel.stack_bytes > 0 and kernel.registers == 255
