"""JSONL, JSON and CSV, read so that every complaint names the line."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ftjax.data.faults import Faults
from ftjax.data.row import Row
from ftjax.errors import UserError

LONGEST_LINE = 1 << 30  # bytes; a longer line is a file of another kind


def read_jsonl(path: Path, file: BinaryIO, faults: Faults) -> Iterator[Row]:
    """One object a line; empty lines are passed over."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        where = f"{path}:{number}"
        if len(line) == LONGEST_LINE:
            raise UserError(f"{where}: this line is longer than {LONGEST_LINE >> 20} MiB; is this a JSONL file?")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            row = Row(_object(_parse(_decode(line.rstrip(b"\r\n"), where), where), where), where)
        except UserError as error:
            faults(error)
            continue
        yield row


def read_json(path: Path, file: BinaryIO, faults: Faults) -> Iterator[Row]:
    """A list of objects, alone or as the one list in an object; JSON lines under the name .json are read too."""
    raw = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(f"{path}:{raw.count(10, 0, error.start) + 1}", raw[error.start])) from None
    if not text.strip():
        return
    if text.lstrip()[0] == "[":
        yield from _json_list(path, text, len(text) - len(text.lstrip()), faults)
        return
    first, _, rest = text.strip().partition("\n")
    if rest.lstrip()[:1] == "{" and _is_json(first):
        yield from read_jsonl(path, io.BytesIO(raw), faults)
        return
    value = _object(_parse(text, str(path), lines=True), str(path))
    lists = {name: v for name, v in value.items() if isinstance(v, list)}
    if len(lists) > 1 and all(isinstance(item, dict) for items in lists.values() for item in items):
        raise UserError(f"{path}: holds several lists ({', '.join(lists)}); give each a file of its own")
    nested = next(iter(lists.values())) if len(lists) == 1 and len(value) == 1 else None
    if nested is None or any(isinstance(v, dict) and "role" in v for v in nested):
        yield Row(value, f"{path}[0]")  # one example by itself
        return
    for number, item in enumerate(nested):
        try:
            row = Row(_object(item, f"{path}[{number}]"), f"{path}[{number}]")
        except UserError as error:
            faults(error)
            continue
        yield row


def _json_list(path: Path, text: str, start: int, faults: Faults) -> Iterator[Row]:
    """The objects of a list, one by one, so that each has its line. A list that breaks off is an error also where rows are
    skipped: what follows the break cannot be told."""
    decode = json.JSONDecoder().raw_decode
    position, line, counted = start + 1, 1, 0

    def place(at: int) -> str:
        nonlocal line, counted
        line += text.count("\n", counted, at)
        counted = at
        return f"{path}:{line}"

    def past_space(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    position = past_space(position)
    if text[position : position + 1] == "]":
        position = past_space(position + 1)
    else:
        while True:
            where = place(position)
            try:
                value, position = decode(text, position)
            except (ValueError, RecursionError) as error:
                raise UserError(_broken(_place_of(error, path, where), error)) from None
            try:
                row = Row(_object(value, where), where)
            except UserError as error:
                faults(error)
            else:
                yield row
            position = past_space(position)
            sign, position = text[position : position + 1], past_space(position + 1)
            if sign == "]":
                break
            if sign != ",":
                raise UserError(
                    f"{place(min(position, len(text)))}: broken JSON: expected ',' or ']' after an object of the list"
                )
    if position < len(text):
        raise UserError(f"{place(position)}: broken JSON: something follows the list")


def read_csv(path: Path, file: BinaryIO, delimiter: str, faults: Faults) -> Iterator[Row]:
    """A header and records of as many fields; empty lines are passed over. A record's place is the line it starts on."""
    # Bytes that are not UTF-8 become surrogates, which no text contains, so that the record that holds them is known.
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _records(path, text, delimiter, faults)


def _records(path: Path, text: TextIO, delimiter: str, faults: Faults) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        where = f"{path}:{start}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" (lines {start} to {reader.line_num})" if reader.line_num > start else ""
            wrong = UserError(f"{where}: broken {'TSV' if delimiter != ',' else 'CSV'}: {error}{lines}")
            if header is None:
                raise wrong from None
            faults(wrong)
            continue
        if not fields or (len(fields) == 1 and not fields[0].strip()):
            if header is not None and len(header) == 1 and fields:
                yield Row({header[0]: fields[0]}, where)
            continue
        wrong = _csv_fault(fields, header, where)
        if wrong is not None:
            if header is None:
                raise wrong
            faults(wrong)
        elif header is None:
            header = fields
        else:
            yield Row(dict(zip(header, fields, strict=True)), where)


def _csv_fault(fields: list[str], header: list[str] | None, where: str) -> UserError | None:
    for field in fields:
        if not field.isascii() and any("\udc80" <= c <= "\udcff" for c in field):
            byte = next(ord(c) - 0xDC00 for c in field if "\udc80" <= c <= "\udcff")
            return UserError(_not_utf8(where, byte))
    if header is None:
        twice = sorted({name for name in fields if fields.count(name) > 1})
        if twice:
            return UserError(f"{where}: a column name occurs twice: {', '.join(map(repr, twice))}")
    elif len(fields) != len(header):
        return UserError(f"{where}: {len(fields)} fields, but the header has {len(header)}: {', '.join(header)}")
    return None


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(where, line[error.start])) from None


def _parse(text: str, where: str, lines: bool = False) -> Any:
    """`lines`: `where` is a file, and the error's own line is added."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python converts
        raise UserError(_broken(_place_of(error, where, where) if lines else where, error)) from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _place_of(error: Exception, path: Path | str, otherwise: str) -> str:
    return f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else otherwise


def _broken(where: str, error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{where}: broken JSON: {error.msg} (column {error.colno})"
    if isinstance(error, RecursionError):
        return f"{where}: broken JSON: nested too deeply"
    return f"{where}: broken JSON: {str(error).partition(';')[0]}"


def _not_utf8(where: str, byte: int) -> str:
    return f"{where}: not UTF-8 (byte {byte:#04x}); convert the file to UTF-8"


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), type(value).__name__)
