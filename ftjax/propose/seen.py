"""What `ftjax init` sees in the data: format, columns to map, number of rows, and validation and test data beside it."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ftjax.config.data import SourceConfig
from ftjax.data.advice import Column, guessed, taken_in_order
from ftjax.data.find import SPLITS, kind
from ftjax.data.read import read_rows
from ftjax.data.reader import AHEAD, Reader
from ftjax.data.row import Row
from ftjax.errors import UserError

MOST = 1_000_000  # rows that are counted


@dataclass(frozen=True)
class Seen:
    """What the first rows of a data set show.

    Attributes:
        format: of `data.format`.
        columns: for `data.columns`: our name to the file's.
        in_order: whether the names of the columns say nothing, so that their order was taken for what they mean.
        rows: number of rows, at most `MOST`.
        first: the first rows.
        beside: files beside it, by split: `validation` and `test`.
    """

    path: str
    format: str
    rows: int
    first: Sequence[Row]
    columns: dict[str, str] = field(default_factory=dict)
    in_order: bool = False
    beside: dict[str, str] = field(default_factory=dict)

    def values(self, name: str) -> list[Any]:
        """Return a column's values in the first rows, by our name; those that are null are left out."""
        theirs = self.columns.get(name, name)
        return [value for row in self.first if (value := row.values.get(theirs)) is not None]

    def has(self, *names: str) -> bool:
        return all(self.values(name) for name in names)


def look(path: str, columns: dict[str, str] | None = None) -> Seen:
    """Look at a data set. Args: columns: what the columns mean, our name to the file's; None finds it out.

    Raises UserError if there is no such data, it cannot be read, or its columns are not understood.
    """
    source = SourceConfig(path=path, split="train")
    rows = read_rows(source)
    first = list(islice(rows, AHEAD))
    count = len(first) + sum(1 for _ in islice(rows, MOST - len(first)))
    name, columns, in_order = _format(source, first, columns or {})
    return Seen(path, name, count, first, columns, in_order, beside(path))


def _format(source: SourceConfig, first: Sequence[Row], columns: dict[str, str]) -> tuple[str, dict[str, str], bool]:
    """Return the format, what the columns mean, and whether that was taken from their order."""
    try:
        reader = Reader(source.model_copy(update={"columns": columns}), first)
    except UserError:
        names = dict.fromkeys(name for row in first for name in row.values)
        there = [Column(name, [v for row in first if (v := row.values.get(name)) is not None]) for name in names]
        for guess in () if columns else (guessed, taken_in_order):
            found = guess(there)
            if found and (name := _read_with(source, first, found)) is not None:
                return name, found, guess is taken_in_order
        raise
    return reader.name, dict(reader.columns), False


def _read_with(source: SourceConfig, first: Sequence[Row], columns: dict[str, str]) -> str | None:
    """Return the format of the rows with these columns; None if fewer than half of them can be read."""
    read = 0
    try:
        reader = Reader(source.model_copy(update={"columns": columns}), first, advising=False)
    except UserError:
        return None
    for row in first:
        with suppress(UserError):
            reader(row)
            read += 1
    return reader.name if 2 * read >= len(first) else None


def beside(path: str) -> dict[str, str]:
    """Return files beside one that is named after its split: `validation.jsonl` and `test.jsonl` beside `train.jsonl`."""
    location = Path(path).expanduser()
    match = re.search(rf"(?:^|[._-])({'|'.join(SPLITS['train'])})(?=[._-])", location.name.lower())
    if not location.is_file() or not match:
        return {}
    found = {}
    for split in ("validation", "test"):
        for word in SPLITS[split]:
            name = location.name[: match.start(1)] + word + location.name[match.end(1) :]
            if (there := location.with_name(name)).is_file() and kind(there):
                found.setdefault(split, str(Path(path).with_name(name)))
    return found


def is_json(text: Any) -> bool:
    """Return whether a text is a JSON object or list."""
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict | list)
    except ValueError:
        return False
