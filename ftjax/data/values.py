"""Reads the values of a row as text, integers or lists, and refuses others with their location."""

import datetime
import decimal
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ftjax.errors import UserError

Values = Mapping[str, Any]
SIMPLE = (str, int, float, bool, type(None))
DATES = (datetime.date, datetime.time, datetime.timedelta)  # a datetime is a date too


class EmptyRow(UserError):
    """A row without anything to learn: `data.drop_empty` drops and counts it."""


def plain(value: Any) -> Any:
    """Convert a table's value to what JSON would hold: UTF-8 bytes, decimals and dates become text.

    Structs lose keys that are null, because a table gives every struct the keys of all others.
    """
    kind = type(value)
    if kind in SIMPLE:
        return value
    if kind is dict:
        return {name: item if type(item) is str else plain(item) for name, item in value.items() if item is not None}
    if kind is list:  # lists of numbers or text can be long, and need no conversion
        return value if not value or type(value[0]) in SIMPLE[:-1] else [plain(item) for item in value]
    if kind is bytes:
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return str(value) if isinstance(value, (decimal.Decimal, *DATES)) else value


def string(v: Values, name: str, where: str) -> str:
    """Return the value as text; numbers and booleans as JSON writes them. Raises UserError for anything else."""
    value = v[name]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {name!r} is {value}, expected text")
    if isinstance(value, int | float):
        try:
            return str(value)
        except ValueError as error:  # more digits than Python converts
            raise UserError(f"{where}: {name!r}: {error}") from None
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} is {kind_of(value)}, expected text")
    check_unicode(value, repr(name), where)
    return value


def optional(v: Values, name: str, where: str) -> str:
    """Return the value as `string` does, or "" if it is absent or null."""
    return "" if v.get(name) is None else string(v, name, where)


def filled(v: Values, name: str, where: str) -> str:
    """Return the value as `string` does. Raises EmptyRow if it is null or blank."""
    if v[name] is None or (isinstance(v[name], str) and not v[name].strip()):
        raise EmptyRow(f"{where}: {name!r} is empty, so there is nothing to learn from this row; fill or remove it")
    return string(v, name, where)


def integers(values: Any, name: str, where: str) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError(f"{where}: {name!r} is {kind_of(values)}, expected a list of whole numbers")
    return values


def finite(v: Values, name: str, where: str) -> float | None:
    """Return a finite number, given as such or as text; None if the column is absent or empty."""
    value = v.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{where}: {name!r} is {value!r:.60}, expected a number")
    return found


def mask(values: Any, name: str, count: int, where: str) -> list[bool]:
    """Return one boolean for each of `count` input_ids, from booleans or 0 and 1."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or not all(value in (0, 1) for value in values):
        raise UserError(f"{where}: {name!r} is {kind_of(values)}, expected a list of 0 and 1")
    if len(values) != count:
        raise UserError(f"{where}: {len(values)} values of {name} for {count} input_ids; the numbers must match")
    return [bool(value) for value in values]


def check_unicode(value: Any, name: str, where: str) -> None:
    """Raise UserError if any text in `value` cannot be encoded as UTF-8."""
    kind = type(value)
    if kind is str:
        if value.isascii():
            return
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise UserError(
                f"{where}: {name} holds half of a character, {half!r} (a lone surrogate); write the text as UTF-8"
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_unicode(key, name, where)
            check_unicode(item, name, where)
    elif kind is list or kind is tuple:
        for item in value:
            check_unicode(item, name, where)


def by_row(value: Any) -> Any:
    """Turn `{"role": ["user", "assistant"], "content": ["Hi", "Hello"]}` into a list of messages; leave other values as
    they are."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(items, list) for items in value.values()):
        return value
    if len({len(items) for items in value.values()}) > 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def normalized(value: Any, normalize: Callable[[str], str]) -> Any:
    """Normalise every text in the value."""
    if isinstance(value, str):
        return normalize(value)
    if isinstance(value, list):
        return [normalized(item, normalize) for item in value]
    return {key: normalized(item, normalize) for key, item in value.items()} if isinstance(value, dict) else value


def kind_of(value: Any) -> str:
    """Name the type for messages: `text`, `a number`, `a list of objects`."""
    names = {type(None): "null", bool: "true or false", str: "text", int: "a number", float: "a number", dict: "an object"}
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of {kind_of(value[0]).removeprefix('a ').removeprefix('an ')}"
    if isinstance(value, bytes):
        return "bytes that are not UTF-8"
    return names.get(type(value), type(value).__name__)


def quoted(names: Iterable[str], join: str = ", ") -> str:
    return join.join(f'"{name}"' for name in names)


def names_of(values: Iterable[str]) -> str:
    names = list(values)
    return quoted(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "no columns"
