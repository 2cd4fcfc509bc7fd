"""Data in memory: lists of rows, `datasets.Dataset` and pandas' DataFrame, as sources with a name.

`keep([{"prompt": "Hi", "completion": "Hello"}], "train")` returns a name such as `memory:train-1f0e3dad99908345`, which stands
where a path would: in `data.train`, in config.yaml and, without the digest, in messages (`memory:train[17]`, rows counted from
0). The digest is of the rows' content, so equal rows have the same name in every process, and a run resumes if they are given
again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from ftjax.config.data import SourceConfig
from ftjax.data.row import Row
from ftjax.data.values import plain
from ftjax.errors import UserError

PREFIX = "memory:"


@dataclass(frozen=True)
class Memory:
    """Rows in memory; `data` is a sequence of mappings, a Dataset or a DataFrame."""

    name: str
    data: Any

    @property
    def label(self) -> str:
        """The name without the digest, as in messages."""
        return self.name.rpartition("-")[0]

    def __len__(self) -> int:
        return len(self.data)

    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises UserError for one that is not a mapping of columns."""
        for number, values in enumerate(_rows(self.data)):
            where = f"{self.label}[{number}]"
            if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
                raise UserError(f"{where}: expected a row as a dict of columns by name, found {type(values).__name__}")
            yield Row({name: _value(value) for name, value in values.items()}, where)

    def fingerprint(self) -> str:
        """Return the digest in the name. Raises UserError if the rows were changed since they were named."""
        digest = self.name.rpartition("-")[2]
        if not _is_dataset(self.data) and _digest(self) != digest:
            raise UserError(f"{self.label}: the rows were changed since they were given; leave them as they are until the end")
        return digest


_kept: dict[str, Memory] = {}


def keep(data: Any, label: str) -> str:
    """Name rows, which stay readable under this name until the process ends; they are referred to, not copied.

    Args:
        data: what `is_rows` accepts.
        label: what the rows are for, such as `train`.

    Raises UserError for data that cannot be read twice, and for a row that is not a mapping.
    """
    kind = type(data).__name__
    if kind in ("DatasetDict", "IterableDatasetDict"):
        raise UserError(
            f"{label}: a {kind} holds several sets ({', '.join(data)}); give one, such as data[{next(iter(data))!r}]"
        )
    if kind == "IterableDataset":
        raise UserError(
            f"{label}: an IterableDataset is read only once, and training reads rows again; give a Dataset or a list, or the "
            "files or the Hub id with data.streaming: true"
        )
    if kind == "Series" or isinstance(data, Iterator):
        what = "is one column" if kind == "Series" else "is read only once"
        raise UserError(f"{label}: a {kind} {what}; give rows: a list of dicts, a Dataset or a DataFrame")
    found = Memory(f"{PREFIX}{label}-", data)
    name = f"{PREFIX}{label}-{_digest(found)}"
    _kept[name] = Memory(name, data)
    return name


def kept(name: str) -> Memory:
    """Return the rows of a name. Raises UserError if this process was not given them."""
    if name not in _kept:
        raise UserError(
            f"{name}: these rows were in the memory of the process that named them, which this one is not. Give them again in "
            "Python (docs/api.md), or name a file"
        )
    return _kept[name]


def is_kept(path: str) -> bool:
    """Return whether a path is a name of rows in memory."""
    return path.startswith(PREFIX)


def is_rows(data: Any) -> bool:
    """Return whether it is data, and not a path, a source (`{path, weight, ...}`) or a list of these."""
    if type(data).__module__.split(".")[0] in ("datasets", "pandas") or isinstance(data, Iterator):
        return True
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Sequence) or not data:
        return False
    return all(isinstance(one, Mapping) and not _is_source(one) for one in data)


def _is_source(value: Mapping[str, Any]) -> bool:
    return "path" in value and set(value) <= set(SourceConfig.model_fields)


def _is_dataset(data: Any) -> bool:
    return type(data).__module__.split(".")[0] == "datasets"


def _rows(data: Any) -> Iterator[Any]:
    if _is_dataset(data):
        for values in data:
            yield {name: plain(value) for name, value in values.items()}
    elif type(data).__module__.split(".")[0] == "pandas":
        names = [str(name) for name in data.columns]
        for values in data.itertuples(index=False, name=None):
            yield dict(zip(names, map(_cell, values), strict=True))
    else:
        yield from data


def _cell(value: Any) -> Any:
    """Return a cell of a DataFrame; NaN, NaT and NA, which stand for what is missing, become null."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    return None if isinstance(value, float) and value != value else value


def _value(value: Any) -> Any:
    """Return a value as JSON would hold it: arrays and tuples become lists, numbers of NumPy those of Python."""
    if isinstance(value, np.ndarray | np.generic):
        return _value(value.tolist())
    if isinstance(value, Mapping):
        return {key: _value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else plain(value)


def _digest(found: Memory) -> str:
    digest = xxhash.xxh3_64()
    for row in found.rows():
        text = json.dumps(row.values, ensure_ascii=True, default=repr)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()
