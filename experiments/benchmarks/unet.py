"""Seconds of one call of Stable Diffusion's UNet on this machine, with each mixer in place of self-attention.

    python -m experiments.benchmarks.unet --model=sd15 --size=256 --mixers=attention,gspn,linfusion,mamba2 \
        --output=experiments/results/unet.csv

Parameters, latents and text are random. gmacs: multiply-adds of matrix products, convolutions and propagations. Times
are those of the host's clock around whole calls, after a warm-up. On a machine that runs other programs (load: how many
in the last minute) least_s is the better figure, and cpu_s: what all cores worked for a call. compiled_mib: arguments,
results and temporaries of the compiled program.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments import command_line, provenance, tables
from experiments.benchmarks import options
from experiments.benchmarks.models import multiply_adds, propagation_multiply_adds, timed
from gspn_jax.mixers import MixerBuilder
from gspn_jax.models import UNET_SIZES, UNet, parameter_count, unet_mixer
from gspn_jax.models.unet import TIME_IDS
from pallas_kernels import record_choices

TOKENS = 77  # of a prompt
PIXELS = 8  # of an image's side, to one of its latents
# "gspn_qkv" is GSPN with query, key and value.
MIXERS = ("attention", "gspn", "gspn_qkv", "linfusion", "mamba", "mamba2")


def mixer_of(model: str, mixer: str, **given: Any) -> MixerBuilder:
    """Returns the builder of a mixer in `MIXERS` for a network in `UNET_SIZES`; `given` are options of the mixer."""
    if mixer == "gspn_qkv":
        return unet_mixer("gspn", {"query_key_value": True, **given})
    if (model, mixer) != ("sdxl", "linfusion"):
        return unet_mixer(mixer, given)

    def linfusion(features: int, **passed: Any) -> nnx.Module:
        # The released file for SDXL has two small networks of this width in each layer.
        return unet_mixer("linfusion", {"inner": features // 16, **given})(features, **passed)

    return linfusion


def abstract_unet(model: str, mixer: str, dtype: str, **given: Any) -> UNet:
    """Returns a UNet whose parameters, in `dtype` as its computation, are shapes; for `given` see `mixer_of`."""
    kinds: Any = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    build = functools.partial(UNet, **UNET_SIZES[model], mixer=mixer_of(model, mixer, **given), **kinds)
    return nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))


def input_shapes(model: str, size: int, batch_size: int) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of a UNet's arguments for images of `size` pixels a side; ValueError unless 8 divides it."""
    if size % PIXELS:
        raise ValueError(f"size: expected a multiple of {PIXELS}, got {size}")
    widths, side = UNET_SIZES[model], size // PIXELS
    shapes = [(side, side, 4), (), (TOKENS, widths["context_width"])]
    shapes += [(widths["text_width"],), (TIME_IDS,)] if "text_width" in widths else []
    return [jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32) for shape in shapes]


def benchmark(
    model: str, mixer: str, *, size: int, batch_size: int, dtype: str, implementation: str | None, repeats: int
) -> dict[str, Any]:
    """Returns the row of a mixer; the command's flags say what each argument means."""
    given = {"implementation": implementation} if mixer.startswith("gspn") else {}
    unet = abstract_unet(model, mixer, dtype, **given)
    graph, shapes = nnx.split(unet)
    inputs = input_shapes(model, size, batch_size)

    def call(params: Any, *inputs: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(*inputs)

    with record_choices() as choices:
        dense = multiply_adds(call, shapes, *inputs)
    generator = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        return jnp.asarray(0.02 * generator.standard_normal(leaf.shape, np.float32), leaf.dtype)

    found = timed(call, jax.tree.map(draw, shapes), *map(draw, inputs), repeats=repeats)
    return {
        "model": model,
        "mixer": mixer,
        "implementation": " ".join(sorted({choice.implementation for choice in choices})) or "none",
        "dtype": dtype,
        "size": size,
        "batch_size": batch_size,
        "parameters": parameter_count(unet),
        "gmacs": round((dense + propagation_multiply_adds(choices)) / 1e9, 3),
        "compile_s": round(found.compile_s, 1),
        "median_s": float(f"{found.median_s:.4g}"),
        "least_s": float(f"{found.least_s:.4g}"),
        "cpu_s": float(f"{found.cpu_s:.4g}"),
        "compiled_mib": "" if found.compiled_mib is None else found.compiled_mib,
        "load": round(os.getloadavg()[0], 1),
    }


def run(model: str, mixers: Sequence[str], output: str | None, **given: Any) -> list[dict[str, Any]]:
    """Times each mixer, prints its row, and writes the table if `output` is a path."""
    rows = []
    for mixer in mixers:
        rows.append(benchmark(model, mixer, **given))
        print(*(f"{key}: {value}" for key, value in rows[-1].items()), sep="\n", end="\n\n", flush=True)
        if output:
            tables.write(output, rows, list(rows[0]), provenance.stamp())
    return rows


def define_flags() -> None:
    flags.DEFINE_enum("model", "sd15", list(UNET_SIZES), "The network.")
    flags.DEFINE_list("mixers", ["attention", "gspn"], f"Some of {', '.join(MIXERS)}.")
    flags.DEFINE_integer("size", 256, "Side of the images in pixels, a multiple of 8.", lower_bound=PIXELS)
    flags.DEFINE_integer("batch_size", 1, "Images per call; guidance takes two for each image.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Dtype of parameters and computation.")
    flags.DEFINE_string("implementation", None, "Of GSPN's propagation, xla or mosaic; by default the fastest here.")
    flags.DEFINE_integer("repeats", 5, "Timed calls.", lower_bound=1)
    flags.DEFINE_string("output", None, "CSV file to write.")


def main() -> None:
    chosen = flags.FLAGS
    names = ("size", "batch_size", "dtype", "implementation", "repeats")
    run(chosen.model, options.chosen("mixers", MIXERS), chosen.output, **{name: chosen[name].value for name in names})


if __name__ == "__main__":
    command_line.start(main, define_flags)
