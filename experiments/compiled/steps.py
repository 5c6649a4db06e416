"""What a whole train step takes of an H200, from compilation on a machine without one.

    python -m experiments.step_report --only=gspn_t --out=experiments/results

Writes step_report.md and step_report.csv: the memory of each step (forward, loss, backward, AdamW and moving average;
bfloat16, the state donated) and, for every part of it, the least time that its bytes and its flops take. Needs
requirements-gpu-compile.txt and no GPU; three to six minutes a step. No column is a time measured on a GPU.
"""

import csv
import datetime
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags

from experiments import command_line, deviceless, provenance
from experiments.kernel_limits import COPY_BANDWIDTH
from experiments.step_cases import MODELS, VARIANTS, compile_step
from experiments.step_parts import KERNELS, MATRIX_FLOPS, SCANS, VECTOR_FLOPS, WHOLE, Row, rows_of_program

LARGE = 0.15  # share of the estimated time from which a part is named
NOTE = (
    "Compiled, not executed: nothing here is a measured time. limit_ms adds up, of all instructions, the larger of two "
    f"times: operands and results at {COPY_BANDWIDTH / 1e12} TB/s; matrix products and convolutions at "
    f"{MATRIX_FLOPS / 1e12:.0f} TFLOP/s, depthwise ones at {VECTOR_FLOPS / 1e12:.0f}. Caches, starts of kernels, other "
    "arithmetic and how well a library does its work are left out; without a card XLA tunes no product and no "
    "convolution. A fusion belongs to the part of its last operation; maps are the proxy and the products with it. Of "
    "maps for four directions, a kernel is counted with the one that it takes. compile_s is the time that compilation "
    "took, on two cores that other programs used too. The loss of generators is DiT's, with a learned variance; where "
    "compile_s is missing it is the mean squared error of the noise alone."
)
KEPT, REMAT = "kept", "remat"
NUMBERS = (
    "batch", "compile_s", "launches", "bytes", "flops", "limit_ms", "share",
    "argument_bytes", "output_bytes", "alias_bytes", "temporary_bytes", "peak_bytes",
)  # fmt: skip
COLUMNS = ("model", "variant", "blocks", "part", *NUMBERS, "kinds", "commit", "date", "fault")
_ORDER = (("model", MODELS), ("variant", VARIANTS), ("blocks", (KEPT, REMAT)))


class Case(NamedTuple):
    """What a step is compiled for. `blocks`: "remat" where each is computed again in the backward pass, else "kept"."""

    model: str
    variant: str
    blocks: str

    def __str__(self) -> str:
        return " ".join(self)


def compile_rows(case: Case, batch_size: int = 0) -> list[Row]:
    """The rows of a step: one of the whole with its memory, then its parts; one with the error where it fails."""
    model = MODELS[case.model]
    batch_size = batch_size or model.batch_size
    row: Row = dict.fromkeys(COLUMNS, "")
    row.update(model=case.model, batch=batch_size, variant=case.variant, blocks=case.blocks, part=WHOLE)
    started = time.perf_counter()
    try:
        compiled = compile_step(model.setting(VARIANTS[case.variant], case.blocks == REMAT, batch_size)).compiled
    except Exception as error:  # whatever stops a compiler is a result here
        return [row | {"fault": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]
    row["compile_s"] = round(time.perf_counter() - started, 1)
    whole, *parts = rows_of_program(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    assert memory is not None
    whole.update(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
    )
    return [row | whole, *(row | {"compile_s": ""} | part for part in parts)]


def cases(only: str = "") -> list[Case]:
    """All combinations, those alone whose text contains `only`."""
    listed = (
        Case(model, name, blocks)
        for model in MODELS
        for name, variant in VARIANTS.items()
        if MODELS[model].propagates or name == "xla"
        # Where blocks are computed again, so are their states.
        for blocks in ((KEPT, REMAT) if variant.keep_states else (KEPT,))
    )
    return [case for case in listed if only in str(case)]


def run(listed: Sequence[Case], out: str, batch_size: int = 0) -> list[Row]:
    """Compiles all cases and returns their rows; after each, writes both tables into the folder `out`.

    The rows of other steps that the tables there hold stay, with their commit and date.
    """
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # before the minutes that compilation takes
    about = {
        "command": 'python -m experiments.step_report; a row alone with --only="STEP"',
        "compiled for": f"{deviceless.DEVICE_KIND}, with jax {jax.__version__}",
        "note": NOTE,
    }
    origin = {
        "commit": provenance.commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    written, rows = _read(folder / "step_report.csv"), []
    for number, case in enumerate(listed, 1):
        found = [row | origin for row in compile_rows(case, batch_size)]
        rows += found
        print(f"{number}/{len(listed)} {case}: {found[0]['fault'] or 'compiled'}", flush=True)
        written = sorted([row for row in written if _title(row) != str(case)] + found, key=_place)
        with open(folder / "step_report.csv", "w", newline="") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in about.items())
            writer = csv.DictWriter[str](file, COLUMNS)
            writer.writeheader()
            writer.writerows(written)
        (folder / "step_report.md").write_text(_markdown(about, written))
    return rows


def _read(path: pathlib.Path) -> list[Row]:
    """The rows of a table, with numbers as numbers; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("# ")))
    return [{key: _number(row.get(key, "")) if key in NUMBERS else row[key] for key in COLUMNS} for row in rows]


def _number(text: str) -> float | str:
    return text if text == "" else float(text) if "." in text or "e" in text else int(text)


def _place(row: Row) -> tuple[int, ...]:
    """Where the step of a row stands in the table."""
    return tuple(list(known).index(row[key]) if row[key] in known else len(known) for key, known in _ORDER)


def _markdown(about: dict[str, str], rows: Sequence[Row]) -> str:
    lines = ["# Train steps, compiled for an H200 and not executed", "", *(f"- {key}: {about[key]}" for key in about)]
    whole = [row for row in rows if row["part"] == WHOLE]
    memory = ("argument_bytes", "output_bytes", "alias_bytes", "temporary_bytes", "peak_bytes")
    others = ("limit_ms", "launches", "compile_s", "commit", "date", "fault")
    lines += ["", "## Memory in GB (1e9 bytes)", ""]
    lines += _table(
        ("step", "batch", *(key.removesuffix("_bytes") for key in memory), *others),
        [(_title(row), row["batch"], *(_giga(row[key]) for key in memory), *(row[key] for key in others))
         for row in whole],
    )  # fmt: skip
    large = [
        row for row in rows if row["share"] and row["share"] > LARGE and row["part"] not in (WHOLE, KERNELS, SCANS)
    ]
    lines += ["", f"## More than {LARGE:.0%} of the estimated time, outside of the propagation", ""]
    lines += [f"- {_title(row)}: {row['part']}, {row['share']:.1%} ({row['kinds']})" for row in large] or ["- nothing"]
    for step in whole:
        lines += ["", f"## {_title(step)}", ""]
        lines += _table(
            ("part", "launches", "GB", "TFLOP", "limit_ms", "share", "kinds, by time"),
            [(r["part"], r["launches"], _giga(r["bytes"]), f"{r['flops'] / 1e12:.3f}", r["limit_ms"],
              f"{r['share']:.1%}", r["kinds"])
             for r in rows if _title(r) == _title(step) and r["bytes"] != ""],
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _title(row: Row) -> str:
    return str(Case(row["model"], row["variant"], row["blocks"]))


def _giga(size: Any) -> str:
    return "" if size == "" else f"{size / 1e9:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = (" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in (header, *rows))
    head, *body = (f"| {row} |" for row in cells)
    return [head, "|---" * len(header) + "|", *body]


def define_flags() -> None:
    flags.DEFINE_string(
        "only", "", 'Part of "MODEL VARIANT kept" or "MODEL VARIANT remat": only steps that contain it.'
    )
    flags.DEFINE_string("out", "experiments/results", "Folder for the two tables.")
    flags.DEFINE_integer("batch_size", 0, "Instead of the model's; 0 leaves it.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    reason = deviceless.missing()
    if reason is not None:
        raise ValueError(reason)
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for the libraries to run on a GPU, and gives up
    chosen = flags.FLAGS
    listed = cases(chosen.only)
    if not listed:
        raise ValueError(f"only: no step contains {chosen.only!r}")
    rows = run(listed, chosen.out, chosen.batch_size)
    print(f"{len(rows)} rows written to {chosen.out}/step_report.md and .csv.")
    faulty = [row for row in rows if row["fault"]]
    if faulty:
        raise ValueError(f"{len(faulty)} of {len(listed)} steps failed, the first of {_title(faulty[0])}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
