"""Peak memory, compile time and least time of one UNet call of Stable Diffusion on an H200, compiled without one.

    python -m experiments.compiled.unets --only="sdxl 1024" --output=experiments/results/unet_report

Writes OUTPUT.csv and OUTPUT.md with a row for each network and mixer at the network's own size of images, in bfloat16
with batch 2: one image under classifier-free guidance. "gspn_qkv" is GSPN with query, key and value. Needs
requirements-gpu-compile.txt and no GPU; a call takes one to five minutes. No column is a time measured on a GPU.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from absl import flags
from flax import nnx

from experiments import command_line
from experiments.benchmarks.unet import MIXERS, abstract_unet, input_shapes
from experiments.compiled import programs, report
from experiments.compiled.report import Report, Row
from pallas_kernels.mosaic import compile_only

DTYPE = "bfloat16"
SIZES = {"sd15": 512, "sdxl": 1024}  # pixels a side
IMPLEMENTATIONS = ("xla", "mosaic")  # of GSPN's propagation; other mixers have none of their own
NOTE = (
    f"{programs.NOTE} It holds tracing and the Mosaic kernels. Parameters are bfloat16 arguments. Attention is XLA's, "
    "with scores in memory. Each row names its commit."
)
COLUMNS = ("model", "size", "mixer", "implementation", "batch", "dtype", *programs.COLUMNS)
ORDER = {
    "model": list(SIZES),
    "size": [str(size) for size in SIZES.values()],
    "mixer": MIXERS,
    "implementation": IMPLEMENTATIONS,
}


class Call(NamedTuple):
    """A forward pass to compile: a network in `UNET_SIZES` at images of `size` pixels, with a mixer in `MIXERS`."""

    model: str
    size: int
    mixer: str
    implementation: str

    def __str__(self) -> str:
        return " ".join(map(str, self))


def calls() -> list[Call]:
    """Returns all calls of the report."""
    return [
        Call(model, size, mixer, implementation)
        for model, size in SIZES.items()
        for mixer in MIXERS
        for implementation in (IMPLEMENTATIONS if mixer.startswith("gspn") else ("xla",))
    ]


def compile_call(call: Call, batch_size: int) -> jax.stages.Compiled:
    """Compiles one forward pass from abstract arrays."""
    given = {"implementation": call.implementation} if call.mixer.startswith("gspn") else {}
    graph, params = nnx.split(abstract_unet(call.model, call.mixer, DTYPE, **given))

    def forward(params: nnx.State, *inputs: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(*inputs)

    inputs = input_shapes(call.model, call.size, batch_size)
    return compile_only.compile_for_h200(forward, params, *inputs).compiled


def compile_rows(call: Call, batch_size: int = 2) -> list[Row]:
    """Returns the row of a call, with the error where it does not compile."""
    row: Row = dict.fromkeys(COLUMNS, "") | call._asdict() | {"batch": batch_size, "dtype": DTYPE}
    return [row | programs.compiled_row(lambda: compile_call(call, batch_size))]


def page(about: Mapping[str, str], rows: Sequence[Row]) -> str:
    """Returns the table in Markdown."""
    names = ("model", "size", "mixer", "implementation", "batch")
    title = "Calls of UNets, compiled for an H200 and not executed"
    return report.header(title, about) + programs.table(names, lambda row: [row[name] for name in names], rows)


REPORT = Report(compile_rows, COLUMNS, ORDER, page, NOTE)


def define_flags() -> None:
    report.define_flags("unet_report")


def main() -> None:
    rows = REPORT.run(report.chosen(calls()), flags.FLAGS.output)
    report.refuse_faults(rows, lambda row: f"{row['model']} {row['mixer']} {row['implementation']}: {row['fault']}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
