"""Settings of every test: eight CPU devices, no silent promotion of dtypes or ranks, repeatable examples.

`JAX_PLATFORMS=cuda,cpu make test` also runs the tests that need an NVIDIA GPU; without it everything is on the CPU.
`JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test` tests the programs with XLA's optimizations, in half again the time.
`JAX_COMPILATION_CACHE_DIR=FOLDER make test` keeps the compiled programs: most of a run is compilation, so that the next
one takes a fraction of the time. Not the default: compiled code fits the processor that it was made for.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported, and in the environment, so that the processes that tests start see it as well.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # Most of a run is compilation of programs that take no time: a third of the suite goes with XLA's optimizations.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    # The programs of tests are small and many; JAX by itself keeps those alone that took a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Derandomized: an example that fails in one run fails in all. No deadline: the first example compiles.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")


MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000  # of the 65,530 that Linux grants a process


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Frees compiled programs when there are many: each takes three memory mappings, and without any XLA crashes."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def _has_nvidia_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only files with such a test are read: others import packages that a GPU's machine may lack."""
    if config.option.markexpr != "gpu" or collection_path.name == "conftest.py":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("@pytest.mark.gpu" in file.read_text() for file in files) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_nvidia_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU visible to JAX"))
