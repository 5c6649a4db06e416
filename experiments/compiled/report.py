"""The run that all compile reports share: cases to rows, a CSV that keeps other rows, and a page of Markdown."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags

from experiments import provenance, tables
from pallas_kernels.mosaic import compile_only
from pallas_kernels.mosaic.card import H200

Row = dict[str, Any]


class Report(NamedTuple):
    """What a report holds.

    Attributes:
        compile_rows: a case to its rows, which have "fault" and the columns of `order`.
        columns: of the CSV.
        order: the columns that name a case, and for each the order of its values in the CSV.
        page: header and rows to the Markdown.
        note: how to read the columns.
    """

    compile_rows: Callable[[Any], list[Row]]
    columns: Sequence[str]
    order: Mapping[str, Sequence[str]]
    page: Callable[[Mapping[str, str], Sequence[Row]], str]
    note: str

    def run(self, cases: Sequence[Any], output: str) -> list[Row]:
        """Compiles all cases, writes OUTPUT.csv and OUTPUT.md, and returns the rows.

        Rows of other cases in the CSV stay, with their commit and date. An interrupted run keeps the rows so far.

        Raises:
            ValueError: this machine cannot compile for an H200.
        """
        reason = compile_only.missing()
        if reason is not None:
            raise ValueError(reason)
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for the libraries to run on a GPU, and gives up
        stamp = provenance.stamp()
        compiler = f"{H200.name}, with jax {stamp.pop('jax')} and ptxas {compile_only.assembler_version()}"
        about = stamp | {"compiled for": compiler, "note": self.note}
        origin = {key: stamp[key] for key in ("commit", "date")}
        pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)  # before the minutes of compilation
        rows: list[Row] = []
        try:
            for number, case in enumerate(cases, 1):
                found = [row | origin for row in self.compile_rows(case)]
                rows += found
                faults = "; ".join(row["fault"] for row in found if row["fault"])
                print(f"{number}/{len(cases)} {case}: {faults or 'right'}", flush=True)
        finally:
            if rows:
                self._write(output, rows, about)
        return rows

    def _write(self, output: str, rows: Sequence[Row], about: Mapping[str, str]) -> None:
        path, new = pathlib.Path(f"{output}.csv"), {self._key(row) for row in rows}
        old = tables.read(path)[1] if path.exists() else []
        merged = sorted([row for row in old if self._key(row) not in new] + list(rows), key=self._place)
        tables.write(path, merged, self.columns, about)
        pathlib.Path(f"{output}.md").write_text(self.page(*tables.read(path)))

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in self.order)  # a row of the file holds texts

    def _place(self, row: Row) -> tuple[int, ...]:
        return tuple(
            known.index(value) if value in known else len(known)
            for value, known in zip(self._key(row), self.order.values(), strict=True)
        )


def define_flags(output: str) -> None:
    flags.DEFINE_string("only", "", "Compiles only the rows whose text contains this.")
    flags.DEFINE_integer("every", 1, "Compiles every Nth row.", lower_bound=1)
    flags.DEFINE_string("output", f"experiments/results/{output}", "Path of both files, without .csv and .md.")


def chosen(cases: Sequence[Any]) -> Sequence[Any]:
    """Returns the cases that --only and --every leave; ValueError if there are none."""
    given = flags.FLAGS
    found = [case for case in cases if given.only in str(case)][:: given.every]
    if not found:
        raise ValueError(f"only: no row contains {given.only!r}")
    return found


def refuse_faults(rows: Sequence[Row], title: Callable[[Row], str]) -> None:
    """Prints the number of rows; ValueError if one has a fault."""
    faulty = [row for row in rows if row["fault"]]
    if faulty:
        raise ValueError(f"{len(faulty)} of {len(rows)} rows have a fault, the first: {title(faulty[0])}")
    print(f"{len(rows)} rows written to {flags.FLAGS.output}.csv and .md.")


def header(title: str, about: Mapping[str, str]) -> str:
    """Returns the head of a page: its title and where its numbers come from."""
    return "\n".join([f"# {title}", "", *(f"- {key}: {value}" for key, value in about.items()), "", ""])


def error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
