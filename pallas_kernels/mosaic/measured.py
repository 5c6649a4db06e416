"""What was measured on cards: rates, fastest tiles, and times of propagations. One JSON file per kind of card.

`experiments.benchmarks.tune` and `experiments.benchmarks.first_card` write these files with `add`. Plans and choices
read them when the present card has one, and take the estimate where it has none.

A file holds {"about": {"card", "command", "commit", "date"}, "rates": {field of `estimate.Rates`: value},
"tiles": {`Problem.key`: {fields of `Tile`, "milliseconds"}}, "propagations": [{fields of `variants.Propagation`,
"milliseconds": {mode: {variant: milliseconds}}}]}.
"""

import contextlib
import contextvars
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

FOLDER = pathlib.Path(__file__).with_name("measured")

Table = Mapping[str, Any]

_assumed: contextvars.ContextVar[Mapping[str, float] | None] = contextvars.ContextVar("assumed_rates", default=None)


class Sizes(Protocol):
    """The sizes of a `variants.Propagation`."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # (B, H, W, C)
    @property
    def weight_channels(self) -> int: ...
    @property
    def chunk(self) -> int | None: ...
    @property
    def rank(self) -> int: ...


def tile(card_name: str, key: str) -> dict[str, Any] | None:
    """Returns the fields of the fastest tile of a problem, and its milliseconds; None if it was not measured."""
    return _table(card_name, FOLDER)["tiles"].get(key)


def rates(card_name: str) -> dict[str, float]:
    """Returns the measured fields of `estimate.Rates`; empty if there are none."""
    assumed = _assumed.get()
    return _table(card_name, FOLDER)["rates"] if assumed is None else dict(assumed)


@contextlib.contextmanager
def assume_rates(rates: Mapping[str, float]) -> Iterator[None]:
    """Makes `rates` return these in the block: to fit them to times."""
    token = _assumed.set(rates)
    try:
        yield
    finally:
        _assumed.reset(token)


def nearest(card_name: str, propagation: Sizes) -> dict[str, Any] | None:
    """Returns the row of the measured propagation whose sizes are closest by their logarithms; None without rows."""
    rows = _table(card_name, FOLDER)["propagations"]
    wanted = _features(propagation.shape, propagation.weight_channels, propagation.chunk, propagation.rank)

    def distance(row: Mapping[str, Any]) -> float:
        found = _features(row["shape"], row["weight_channels"], row["chunk"], row["rank"])
        return sum(abs(a - b) for a, b in zip(found, wanted, strict=True))

    return min(rows, key=distance, default=None)


def add(
    card_name: str,
    *,
    about: Mapping[str, str] | None = None,
    rates: Mapping[str, float] | None = None,
    tiles: Mapping[str, Mapping[str, Any]] | None = None,
    propagation: Mapping[str, Any] | None = None,
    milliseconds: Mapping[str, Mapping[str, float]] | None = None,
    folder: pathlib.Path = FOLDER,
) -> pathlib.Path:
    """Adds to the file of a kind of card. A crash leaves the old file or the new one.

    Args:
        card_name: JAX's `device_kind`.
        about: command, commit and date; replace those in the file.
        rates: fields of `estimate.Rates`; replace all rates in the file.
        tiles: by `Problem.key`, the fields of a tile and its milliseconds; replace those of the same keys.
        propagation: the fields of a `variants.Propagation`.
        milliseconds: its times by mode, then by variant; replace those of the same mode and variant.
        folder: where the file is or will be.

    Returns:
        The path of the file.
    """
    table = {key: value.copy() for key, value in _table(card_name, folder).items()}
    table["about"] |= {"card": card_name} | dict(about or {})
    table["rates"] = dict(rates) if rates is not None else table["rates"]
    table["tiles"] |= tiles or {}
    if propagation is not None:
        fields = json.loads(json.dumps(propagation))  # lists in place of tuples, as in the file
        same = [row for row in table["propagations"] if fields.items() <= row.items()]
        times = {mode: dict(of_mode) for mode, of_mode in (same[0]["milliseconds"] if same else {}).items()}
        for mode, of_mode in (milliseconds or {}).items():
            times[mode] = times.get(mode, {}) | dict(of_mode)
        others = [row for row in table["propagations"] if row not in same]
        table["propagations"] = [*others, fields | {"milliseconds": times}]
    path = _path(card_name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(draft, path)
    _table.cache_clear()
    return path


def _path(card_name: str, folder: pathlib.Path) -> pathlib.Path:
    return folder / (re.sub(r"[^a-z0-9]+", "_", card_name.lower()).strip("_") + ".json")


@functools.cache
def _table(card_name: str, folder: pathlib.Path) -> Table:
    """Returns the file's contents, with empty parts where it lacks them."""
    path = _path(card_name, folder)
    empty = {"about": {}, "rates": {}, "tiles": {}, "propagations": []}
    return empty | (json.loads(path.read_text()) if path.exists() else {})


def _features(shape: tuple[int, ...], weight_channels: int, chunk: int | None, rank: int) -> list[float]:
    """Returns logarithms of the sizes that times depend on."""
    batch, height, width, channels = shape
    longer, shorter = max(height, width), min(height, width)
    lines = min(chunk or longer, longer)
    return [math.log2(n) for n in (longer, shorter, lines, batch * channels, channels / weight_channels, rank + 16)]
