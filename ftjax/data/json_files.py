"""Reads JSON and JSONL tables of several shapes; every error names the line or the row."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ftjax.data.faults import Faults
from ftjax.data.row import Row
from ftjax.data.text_encoding import BOM, LONGEST_LINE, decoded, not_utf8
from ftjax.data.values import kind_of
from ftjax.errors import UserError


def read_jsonl(path: Path, file: BinaryIO, faults: Faults) -> Iterator[Row]:
    """Yield one object per line; skip empty lines."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        where = f"{path}:{number}"
        if len(line) == LONGEST_LINE:
            raise UserError(f"{where}: this line is longer than {LONGEST_LINE >> 20} MiB; is this a JSONL file?")
        if number == 1:
            line = line.removeprefix(BOM)
            if line.lstrip()[:1] == b"[":
                rest = file.read()
                if not rest.strip() or not _is_json(line):  # a JSON list in a file named .jsonl
                    yield from read_json(path, io.BytesIO(line + rest), faults)
                    return
                file = io.BytesIO(rest)
        if not line.strip():
            continue
        try:
            row = Row(_object(_parse(decoded(line.rstrip(b"\r\n"), where), where), where), where)
        except UserError as error:
            faults(error)
            continue
        yield row


def read_json(path: Path, file: BinaryIO, faults: Faults) -> Iterator[Row]:
    """Yield the objects of a JSON file; rows of a list are counted from 0.

    The file may hold a list of objects or texts, alone or as the only list in an object; a table by columns or by rows, as
    pandas writes it; a single example; or JSON lines.
    """
    raw = file.read().removeprefix(BOM)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(f"{path}:{raw.count(10, 0, error.start) + 1}", raw[error.start])) from None
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
    for number, item in enumerate(_table(value, path)):
        where = f"{path}[{number}]"
        try:
            row = Row(_row(item, where), where)
        except UserError as error:
            faults(error)
            continue
        yield row


def _table(value: dict[str, Any], path: Path) -> list[Any]:
    """Return the rows of an object; one if it is itself an example."""
    items = list(value.values())
    names = list(value)
    columns, data = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(data, list) and all(_is_record(item, len(columns)) for item in data):
        return [dict(zip(columns, item, strict=True)) for item in data]  # pandas with orient="split"
    if names and all(isinstance(item, list) for item in items):
        lengths = {len(item) for item in items}
        cells = [cell for item in items for cell in item]
        single = not cells or any(_is_message(cell) for cell in cells) or all(type(cell) is int for cell in cells)
        objects = all(isinstance(cell, dict) for cell in cells)
        if len(items) > 1 and objects and not single:
            raise UserError(f"{path}: holds several lists ({', '.join(names)}); give each a file of its own")
        if len(items) == 1 and objects and not single:
            return items[0]
        if not single and len(lengths) == 1:  # by columns: {"prompt": ["Hi", "Bye"], "completion": [...]}
            return [dict(zip(names, row, strict=True)) for row in zip(*items, strict=True)]
        return [value]
    if names and all(isinstance(item, dict) for item in items) and len({tuple(item) for item in items}) == 1:
        inner = list(items[0])
        if inner and all(name.isdigit() for name in inner):  # pandas by columns: {"prompt": {"0": "Hi", "1": "Bye"}, ...}
            return [{name: value[name][number] for name in names} for number in inner]
        return items if len(items) > 1 or names[0].isdigit() else [value]  # by rows: {"0": {"prompt": "Hi", ...}, "1": {...}}
    lists = [item for item in items if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)]
    if len(lists) == 1 and not OF_ONE & value.keys() and not any(_is_message(row) for row in lists[0]):
        return lists[0]  # {"version": "1.0", "data": [{...}, {...}]}
    return [value]


# Columns of an example: a list of objects beside them (tools, documents) is part of it.
OF_ONE = {"text", "prompt", "completion", "messages", "conversations", "instruction", "output", "question", "answer", "chosen"}


def _is_record(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def _row(value: Any, where: str) -> dict[str, Any]:
    return {"text": value} if isinstance(value, str) else _object(value, where)


def _json_list(path: Path, text: str, start: int, faults: Faults) -> Iterator[Row]:
    """Yield the objects of a list. A list that breaks off is an error even if broken rows are skipped: the rest cannot be
    read."""
    decode = json.JSONDecoder().raw_decode
    position, line, counted, number = start + 1, 1, 0, 0

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
            where = f"{path}[{number}]"
            try:
                value, position = decode(text, position)
            except (ValueError, RecursionError) as error:
                raise UserError(_broken(_place_of(error, path, where), error)) from None
            number += 1
            try:
                row = Row(_row(value, where), where)
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


def _parse(text: str, where: str, lines: bool = False) -> Any:
    """Parse JSON. With `lines`, `where` is a file and the error adds its own line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number with more digits than Python converts
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


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {kind_of(value)}")
    return value
