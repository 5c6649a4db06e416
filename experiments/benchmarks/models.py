"""Parameters, multiply-adds, images per second and memory of the classifiers.

    python -m experiments.benchmarks.models --models=gspn_t,gspn_s,gspn_b --batch_size=128 \
        --output=experiments/results/models.csv

Times are medians of the host's clock around whole steps, after a warm-up. Memory: arguments, results and temporaries of
the compiled program, and the allocator's peak where the device keeps one.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx

from experiments import command_line, provenance, tables
from gspn_jax.models import PRESETS, create_model, parameter_count
from pallas_kernels import record_choices


class Timing(NamedTuple):
    """Seconds of a program, and its memory."""

    compile_s: float
    median_s: float
    least_s: float
    cpu_s: float  # mean of a run: of all cores for this process
    compiled_mib: int | None  # arguments, results and temporaries; None where the compiler does not say


def multiply_adds(function: Callable, *args: Any) -> int:
    """Counts the multiply-adds of matrix products and convolutions in `function(*args)`, without running it."""
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            size = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += size * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += math.prod(kernel) // outputs * math.prod(equation.outvars[0].aval.shape)
        elif name == "cond":  # one branch for each platform: the last is the general one
            total += _count(params["branches"][-1].jaxpr)
        else:
            repeats = params["length"] if name == "scan" else 1
            total += repeats * sum(_count(inner) for inner in jax.extend.core.jaxprs_in_params(params))
    return total


def propagation_multiply_adds(choices: Sequence[Any]) -> int:
    """Counts the multiply-adds of recorded propagations.

    Per direction, pixel and channel: 3 for the neighbours, and one each for lam, gate, skip and merge.
    """
    propagations = ("propagate", "propagate_low_rank")
    return sum(4 * 7 * math.prod(choice.shape) for choice in choices if choice.operation in propagations)


def benchmark(name: str, *, image_size: int, batch_size: int, mixer: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Returns the row of a model; the command's flags say what each argument means."""
    build = functools.partial(create_model, name, num_classes=1000, mixer=mixer)
    graph, params = nnx.split(nnx.jit(lambda: build(dtype=dtype, rngs=nnx.Rngs(0)))())
    images = jnp.zeros((batch_size, image_size, image_size, 3))
    labels = jnp.zeros(batch_size, jnp.int32)

    def forward(params, images):
        return nnx.merge(graph, params)(images)

    def train(params, images):
        def loss(params):
            logits = nnx.merge(graph, params)(images, key=jax.random.key(0))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    one = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with record_choices() as choices:
        dense = multiply_adds(forward, params, one)
    row = {
        "model": name,
        "mixer": mixer,
        "dtype": dtype,
        "image_size": image_size,
        "batch_size": batch_size,
        "parameters": parameter_count(nnx.merge(graph, params)),
        "gmacs": round((dense + propagation_multiply_adds(choices)) / 1e9, 3),
        "gmacs_propagation": round(propagation_multiply_adds(choices) / 1e9, 3),
        "implementation": " ".join(sorted({choice.implementation for choice in choices})) or "none",
    }
    for kind, function in (("inference", forward), ("gradient", train)):
        found = timed(function, params, images, repeats=repeats)
        row[f"{kind}_compile_s"] = round(found.compile_s, 1)
        row[f"{kind}_images_per_s"] = float(f"{batch_size / found.median_s:.4g}")
        if found.compiled_mib is not None:
            row[f"{kind}_compiled_mib"] = found.compiled_mib
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    row["peak_mib"] = round(statistics_of_device.get("peak_bytes_in_use", 0) / 2**20) or "not kept"
    return row


def timed(function: Callable[..., Any], *args: Any, repeats: int) -> Timing:
    """Compiles `function(*args)` and runs it once to warm up, then `repeats` times by the host's clock."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_s = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    times, cpu_start = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    cpu_s = (time.process_time() - cpu_start) / repeats
    memory, mib = compiled.memory_analysis(), None
    if memory is not None:
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        mib = round(needed / 2**20)
    return Timing(compile_s, statistics.median(times), min(times), cpu_s, mib)


def run(names: Sequence[str], output: str | None, **options: Any) -> list[dict[str, Any]]:
    """Benchmarks each model, prints its row, and writes the table if `output` is a path."""
    rows = []
    for name in names:
        rows.append(benchmark(name, **options))
        print(*(f"{key}: {value}" for key, value in rows[-1].items()), sep="\n", end="\n\n", flush=True)
    if output:
        tables.write(output, rows, list(rows[0]), provenance.stamp())
    return rows


def define_flags() -> None:
    names = ", ".join(name for name, preset in PRESETS.items() if preset.network == "classifier")
    flags.DEFINE_list("models", ["gspn_t"], f"Some of {names}.")
    flags.DEFINE_integer("image_size", 224, "Side of the images.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Images per step.", lower_bound=1)
    flags.DEFINE_string("mixer", "gspn", "gspn or attention.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of the computation.")
    flags.DEFINE_integer("repeats", 10, "Timed steps.", lower_bound=1)
    flags.DEFINE_string("output", None, "CSV file to write.")


def main() -> None:
    chosen = flags.FLAGS
    options = {key: chosen[key].value for key in ("image_size", "batch_size", "mixer", "dtype", "repeats")}
    run(chosen.models, chosen.output, **options)


if __name__ == "__main__":
    command_line.start(main, define_flags)
