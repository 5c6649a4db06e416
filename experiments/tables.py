"""Tables of results: CSV files that begin with lines `# key: value`, and Markdown."""

import csv
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

Row = Mapping[str, Any]


class Writer:
    """Writes a CSV row by row, so that an interrupted command leaves the rows that it finished."""

    def __init__(self, file: TextIO, columns: Sequence[str], about: Mapping[str, str] | None = None):
        """Writes the header.

        Args:
            file: opened for writing with newline="".
            columns: names of the columns; other keys of a row are left out.
            about: becomes one line `# key: value` for each entry.
        """
        file.writelines(f"# {key}: {value}\n" for key, value in (about or {}).items())
        self._file, self._rows = file, csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        self._rows.writeheader()

    def write(self, row: Row) -> None:
        self._rows.writerow(row)
        self._file.flush()


def write(
    path: str | pathlib.Path, rows: Iterable[Row], columns: Sequence[str], about: Mapping[str, str] | None = None
) -> None:
    """Writes a CSV at once."""
    with open(path, "w", newline="") as file:
        writer = Writer(file, columns, about)
        for row in rows:
            writer.write(row)


def read(path: str | pathlib.Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Returns the `# key: value` lines and the rows of a CSV."""
    with open(path, newline="") as file:
        lines = list(file)
    about = [line.removeprefix("# ").rstrip("\n").partition(": ") for line in lines if line.startswith("# ")]
    rows = csv.DictReader(line for line in lines if not line.startswith("# "))
    return {key: value for key, _, value in about}, list(rows)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table; each row holds a value for each column."""
    cells = [[str(value).replace("|", "\\|") for value in row] for row in (columns, *rows)]
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|---" * len(columns) + "|", *body])
