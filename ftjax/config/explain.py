"""Translates pydantic's errors into the terms of the configuration file."""

import difflib
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from ftjax.config.alias import EXPLAINED, plain_name
from ftjax.config.schema import models_at, section_fields, suggestion, variants
from ftjax.config.yaml_text import Path

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of ordinary size",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a mapping (`key: value` lines)",
    "model_type": "a mapping (`key: value` lines)",
    "model_attributes_type": "a mapping (`key: value` lines)",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def explain(error: ValidationError, tree: dict[str, Any], report: Callable[[Path, str], None]) -> None:
    """Call `report(path, message)` once for each wrong value or key of `tree`."""
    found: dict[Path, list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_path(item, tree), []).append(item)
    for path, items in found.items():
        deeper = any(other[: len(path)] == path and len(other) > len(path) for other in found)
        if deeper and all(item["type"] in _EXPECTED for item in items):
            continue  # another branch of a union matched the value's type; its error is the useful one
        dotted = ".".join(map(str, path))
        text = _message(path, items, tree)
        report(path, f"{dotted}: {text}" if dotted else text)


def _path(item: dict[str, Any], tree: Any) -> Path:
    """Convert pydantic's location to a path without the names of union branches."""
    path: Path = ()
    value = tree
    for index, piece in enumerate(item["loc"]):
        last = index == len(item["loc"]) - 1
        if (isinstance(value, dict) and piece in value) or (isinstance(value, list) and isinstance(piece, int)):
            path, value = (*path, piece), value[piece]
        elif last and item["type"] == "missing":
            path = (*path, piece)
    return path


def _message(path: Path, items: list[dict[str, Any]], tree: dict[str, Any]) -> str:
    first = items[0]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        name = plain_name(str(path[-1]))
        return f"unknown key; {EXPLAINED[name] if name in EXPLAINED else suggestion(path, tree)}"
    if kind == "missing":
        field = next((m.model_fields[path[-1]] for m in models_at(path[:-1], tree) if path[-1] in m.model_fields), None)
        return f"missing, and it has no default{_described(field)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        names = list(variants(section_fields()[str(path[0])])) if path and path[0] in section_fields() else []
        if kind == "union_tag_not_found":
            return f"{context['discriminator']} is missing; one of {', '.join(names)}"
        discriminator = context["discriminator"].strip("'")
        return f"unknown {discriminator} {context['tag']!r}; {_choice(context['tag'], names)}"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        return f"found {_shown(first['input'])}; {_choice(first['input'], choices)}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]}; found {_shown(first['input'])}"
    if kind == "value_error":
        return first["msg"].removeprefix("Value error, ")
    expected = list(dict.fromkeys(_EXPECTED[item["type"]] for item in items if item["type"] in _EXPECTED))
    if expected:
        hint = ""
        if "a string" in expected and isinstance(first["input"], int | float) and not isinstance(first["input"], bool):
            hint = " (put it in quotes)"
        elif len(path) == 1 and expected == [_EXPECTED["model_type"]] and isinstance(first["input"], str):
            hint = f"; write {path[0]}: {{{_main_key(path, tree)}: {first['input']}}}"
        return f"expected {' or '.join(expected)}, found {_shown(first['input'])}{hint}"
    return f"{first['msg'][0].lower()}{first['msg'][1:]}; found {_shown(first['input'])}"


def _main_key(path: Path, tree: dict[str, Any]) -> str:
    """Return the key that is meant by a plain value for a section, as in `model: gpt2` or `method: lora`."""
    return next(iter(models_at(path, tree)[0].model_fields))


def _described(field: Any) -> str:
    return f" ({field.description})" if field is not None and field.description else ""


def _choice(given: Any, known: list[str]) -> str:
    close = difflib.get_close_matches(str(given).lower(), known, n=1, cutoff=0.6)
    return f"{f'did you mean {close[0]}? ' if close else ''}known: {', '.join(known)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
