"""Rows out of files, each with the place that it came from.

JSONL (`.jsonl`, `.ndjson`), JSON (a list of objects), CSV, TSV and Parquet, plain or with `.gz`; folders and globs of them;
Hub data sets through `datasets`.
"""

import csv
import glob
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftjax.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One record. `where` is `file:line` for text files and `file[row]` for the others."""

    values: dict[str, Any]
    where: str


def read_rows(path: str, split: str = "train") -> list[Row]:
    """Every row of a file, a folder, a glob, or a Hub data set (`name` or `name:split`).

    Raises UserError, with file and line, for what is missing, broken or empty.
    """
    rows: list[Row] = []
    for file in find_files(path, split):
        rows += file if isinstance(file, list) else _read_file(file)
    if not rows:
        raise UserError(f"{path}: no rows; expected at least one example")
    return rows


def find_files(path: str, split: str) -> list[Path | list[Row]]:
    """The files that a path means, or the rows of a Hub data set."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file() and _kind(p))
        if not files:
            raise UserError(f"{path}: this folder holds no data file; expected {', '.join(SUFFIXES)} (or .gz of them)")
        return list(files)
    if any(c in path for c in "*?["):
        files = [Path(p) for p in sorted(glob.glob(path, recursive=True))]
        if not files:
            raise UserError(f"{path}: this pattern matches no file")
        return list(files)
    if _kind(place) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path}: no such file. A relative path is looked up from the working directory, {Path.cwd()}")
    return [_from_hub(path, split)]


def _from_hub(name: str, split: str) -> list[Row]:
    import datasets

    name, _, part = name.partition(":")
    try:
        data = datasets.load_dataset(name, split=part or split)
    except Exception as error:  # the Hub's, the network's and the builder's errors have no common base
        raise UserError(
            f"{name}: neither a file here nor a Hub data set that could be loaded: {str(error).splitlines()[0]}"
        ) from None
    return [Row(dict(values), f"{name}[{number}]") for number, values in enumerate(data)]


def _kind(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _read_file(path: Path) -> list[Row]:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)} (or .gz of them)")
    try:
        if kind == ".parquet":
            import pyarrow.parquet as parquet

            return [Row(values, f"{path}[{n}]") for n, values in enumerate(parquet.read_table(path).to_pylist())]
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # pyarrow's errors
        raise UserError(f"{path}: not a readable {kind} file: {str(error).splitlines()[0]}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x}); convert the file to UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty; expected at least one example")
    reader = {".json": _json, ".csv": _csv, ".tsv": _csv}.get(kind, _jsonl)
    return list(reader(path, text))


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Row(_object(_parse(line, f"{path}:{number}"), f"{path}:{number}"), f"{path}:{number}")


def _json(path: Path, text: str) -> Iterator[Row]:
    if text.lstrip().startswith("{") and "\n" in text.strip():
        try:
            json.loads(text)
        except json.JSONDecodeError:
            yield from _jsonl(path, text)  # JSON lines under the name .json are common
            return
    value = _parse(text, str(path))
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 and len(value) == 1 else [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects, found {type(value).__name__}")
    for number, item in enumerate(value):
        yield Row(_object(item, f"{path}[{number}]"), f"{path}[{number}]")


def _csv(path: Path, text: str) -> Iterator[Row]:
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    csv.field_size_limit(1 << 30)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}:{start}: broken {_kind(path)}: {error}") from None
        if not fields:
            continue
        if header is None:
            header = fields
            if len(set(header)) != len(header):
                raise UserError(f"{path}:{start}: a column name occurs twice: {', '.join(header)}")
        elif len(fields) != len(header):
            raise UserError(f"{path}:{start}: {len(fields)} fields, but the header has {len(header)}: {', '.join(header)}")
        else:
            yield Row(dict(zip(header, fields, strict=True)), f"{path}:{start}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON: {error}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value
