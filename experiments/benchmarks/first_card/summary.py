"""The last page that a run prints: what became of each step, and the figures."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

MOST_CHARACTERS = 11_000  # a terminal, or a log that keeps only its end, shows all of it


def summary(outcomes: Sequence[Row], rows: Sequence[Row]) -> str:
    """Returns a line for each step, each followed by the figures among `rows` that belong to it."""
    lines = []
    for outcome in outcomes:
        lines.append(
            f"{outcome['status'].upper()} part {outcome['part']} {outcome['step']}, {outcome['seconds']:.0f} s"
        )
        lines += [f"  {text}" for row in rows if row["step"] == outcome["step"] and (text := _figures(row))]
    text = "\n".join(lines)
    left_out = "\n  ... more in results.jsonl ...\n"
    half = (MOST_CHARACTERS - len(left_out)) // 2
    return text if len(text) <= MOST_CHARACTERS else text[:half] + left_out + text[-half:]


def _figures(row: Row) -> str:
    """Returns a row in one line; "" for the row of the step itself."""
    match row["kind"]:
        case "step":
            return ""
        case "time":
            words = [str(row[key]) for key in ("variant", "direction", "mode") if row.get(key)]
            words += [row["implementation"]] if row["implementation"] == "xla" else []
            words += [_tile(row["tile"]) + " planned" * row["planned"]] if "tile" in row else []
            estimated = sum(launch["estimated_ms"] for launch in row.get("launches", ()))
            figures = f"{row['milliseconds']:.4g} ms, kernels by the estimate {estimated:.4g}" if estimated else ""
            return f"{' '.join(words)}: {row['status']} {figures or row.get('note') or _number(row, 'milliseconds')}"
        case "family":
            return f"{row['mode']}: {row['status']}, error {_number(row, 'error')}, {row['runs']} runs"
        case kind:
            shown = {key: value for key, value in row.items() if key not in ("kind", "step") and value is not None}
            return f"{kind}: " + ", ".join(f"{key} {_number(row, key)}" for key in shown)


def _number(row: Row, key: str) -> str:
    value = row.get(key)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tile(fields: Row) -> str:
    return " ".join(f"{key}={int(value)}" for key, value in fields.items())
