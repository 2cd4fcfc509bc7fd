"""Reads CSV, TSV and plain text; every error names the line."""

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from ftjax.data.faults import Faults
from ftjax.data.row import Row
from ftjax.data.text_encoding import BOM, LONGEST_LINE, decoded, not_utf8
from ftjax.errors import UserError

TAB = "\t"
DELIMITERS = (",", ";", TAB, "|")


def read_plain(path: Path, file: BinaryIO, by: str, faults: Faults) -> Iterator[Row]:
    """Yield a row with the column `text` per line, per paragraph (separated by empty lines) or for the whole file
    (`document`)."""
    text: list[str] = []
    begins = 1
    for number, line in enumerate(file, 1):
        try:
            said = decoded(line.removeprefix(BOM) if number == 1 else line, f"{path}:{number}").rstrip("\r\n")
        except UserError as error:
            faults(error)
            continue
        if by == "document" or said.strip():
            begins = begins if text else number
            text.append(said)
        if text and (by == "line" or (by == "paragraph" and not said.strip())):
            yield Row({"text": "\n".join(text)}, f"{path}:{begins}")
            text = []
    if any(line.strip() for line in text):
        yield Row({"text": "\n".join(text).strip("\n")}, str(path) if by == "document" else f"{path}:{begins}")


def read_csv(path: Path, file: BinaryIO, delimiter: str | None, usual: str, faults: Faults) -> Iterator[Row]:
    """Yield the records after a header, each with as many fields; skip empty lines. A record's location is its first line.

    Args:
        delimiter: None: `usual`, or the one that the first lines show.
    """
    # Bytes that are not UTF-8 become surrogates, which no text contains, and so identify the record.
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        head = text.read(1 << 16)
        head += text.readline()
        lines = chain(io.StringIO(head, newline=""), text)
        if named := re.match(r"sep=(.)\r?\n", head):  # Excel's notation for it
            next(lines)
            yield from _records(path, lines, delimiter or named[1], faults, 1)
        else:
            yield from _records(path, lines, delimiter or _delimiter(head, usual), faults)


def _delimiter(head: str, usual: str) -> str:
    """Return the delimiter that splits most of the first records into as many fields as the header, at least two."""
    csv.field_size_limit(LONGEST_LINE)
    found = usual
    most = 0.0
    for delimiter in dict.fromkeys((usual, *DELIMITERS)):
        try:
            records = list(islice(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter), 50))
        except csv.Error:
            continue
        records = [record for record in records if any(field.strip() for field in record)]
        if not records or len(records[0]) < 2:
            continue
        same = sum(len(record) == len(records[0]) for record in records) / len(records)
        if same > most:
            found, most = delimiter, same
    return found


def _records(path: Path, text: Iterator[str], delimiter: str, faults: Faults, before: int = 0) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    lines: list[str] = []  # of the current record
    reader = csv.reader(_kept(text, lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + before + 1
        where = f"{path}:{start}"
        lines.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            stop = reader.line_num + before
            opened, closed = _quote(lines, delimiter)
            if not closed and stop > start + opened:  # later rows would be lost, which is worse than one broken row
                raise UserError(
                    f"{path}:{start + opened}: a quote opens here and does not close, so that the lines up to {stop} would be "
                    'one field; close it, or write a quote that is part of a text twice, in a field between quotes: "5"" pipe"'
                ) from None
            reach = f" (lines {start} to {stop}; the last quote opens in line {start + opened})" if stop > start else ""
            wrong = UserError(f"{where}: broken {'TSV' if delimiter == TAB else 'CSV'}: {error}{reach}")
            if header is None:
                raise wrong from None
            faults(wrong)
            continue
        if not fields or (len(fields) == 1 and not fields[0].strip()):
            if header is not None and len(header) == 1 and fields:
                yield Row({header[0]: fields[0]}, where)
            continue
        if header is None:  # spaces around a name are never intended; a column without a name still counts
            fields = [name.strip() or f"column {number}" for number, name in enumerate(fields, 1)]
        wrong = _csv_fault(fields, header, where)
        if wrong is not None:
            if header is None:
                raise wrong
            faults(wrong)
        elif header is None:
            header = fields
        else:
            if len(header) > 1 and any(_holds_records(field, delimiter, len(header)) for field in fields if "\n" in field):
                faults.note(
                    f"{where}: a quoted field goes on up to line {reader.line_num + before}, and the lines in it look like "
                    "rows of their own; look whether a quote is missing"
                )
            yield Row(dict(zip(header, fields, strict=True)), where)


def _kept(lines: Iterator[str], kept: list[str]) -> Iterator[str]:
    for line in lines:
        kept.append(line)
        yield line


def _quote(lines: list[str], delimiter: str) -> tuple[int, bool]:
    """Return, for the last quoted field, the number of the line in which it begins, and whether it ends."""
    opened, inside, begins, ended = 0, False, True, False
    for number, line in enumerate(lines):
        for char in line:
            if inside:
                inside = char != '"'
                ended = not inside
                continue
            if char == '"' and (begins or ended):  # after the end of a field it is the second quote of an escaped one
                inside, opened = True, number if begins else opened
            begins, ended = char in (delimiter, "\r", "\n"), False
    return opened, not inside


def _holds_records(field: str, delimiter: str, columns: int) -> bool:
    within = field.splitlines()[1:-1]
    return len(within) > 1 and all(line.count(delimiter) == columns - 1 for line in within)


def _csv_fault(fields: list[str], header: list[str] | None, where: str) -> UserError | None:
    for field in fields:
        if not field.isascii() and any("\udc80" <= c <= "\udcff" for c in field):
            byte = next(ord(c) - 0xDC00 for c in field if "\udc80" <= c <= "\udcff")
            return UserError(not_utf8(where, byte))
    if header is None:
        twice = sorted({name for name in fields if fields.count(name) > 1})
        if twice:
            return UserError(f"{where}: a column name occurs twice: {', '.join(map(repr, twice))}")
    elif len(fields) != len(header):
        return UserError(f"{where}: {len(fields)} fields, but the header has {len(header)}: {', '.join(header)}")
    return None
