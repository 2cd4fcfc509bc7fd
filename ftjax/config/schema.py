"""Inspects the schema: where keys belong, to suggest the right key for a wrong one."""

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic.fields import FieldInfo

from ftjax.config import Config, Section
from ftjax.config.yaml_text import Path


def sections_in(annotation: Any) -> list[type[Section]]:
    """Return every section class inside an annotation: `list[GroupConfig]` -> [GroupConfig], a union -> its members."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def _tag(model: type[Section], discriminator: str) -> str:
    return get_args(model.model_fields[discriminator].annotation)[0]


def variants(field: FieldInfo) -> dict[str, type[Section]]:
    """Return the members of a discriminated union by name (`full`, `lora`, ...); empty for any other field."""
    if not isinstance(field.discriminator, str):
        return {}
    return {_tag(model, field.discriminator): model for model in sections_in(field.annotation)}


@cache
def section_fields() -> dict[str, FieldInfo]:
    """Return the fields of `Config` that are sections: model, method, data, ..."""
    return {name: field for name, field in Config.model_fields.items() if sections_in(field.annotation)}


def add_objective(section: type[Section]) -> str:
    """Add this section to the variants of `objective`; return its name."""
    field = Config.model_fields["objective"]
    field.annotation = field.annotation | section
    Config.model_rebuild(force=True)
    for known in (section_fields, _places, homes):
        known.cache_clear()
    return _tag(section, field.discriminator)


def with_default_tag(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """Fill in the default name of a union: `method: {r: 8}` means the default method."""
    field = section_fields()[name]
    if not isinstance(field.discriminator, str) or field.discriminator in section or field.is_required():
        return section
    return {field.discriminator: getattr(field.get_default(call_default_factory=True), field.discriminator), **section}


def models_at(path: Path, tree: Any) -> list[type[Section]]:
    """Return the section classes whose keys are allowed at `path` of `tree` (several only if nothing selects one)."""
    models: list[type[Section]] = [Config]
    value = tree
    inside: list[type[Section]] = []
    for piece in path:
        value = _child(value, piece)
        if isinstance(piece, int):
            continue  # list items have the classes of the list
        fields = [model.model_fields[piece] for model in models if piece in model.model_fields]
        if not fields:
            return []
        inside = []
        for field in fields:
            by_name = variants(field)
            chosen = by_name.get(value.get(field.discriminator)) if by_name and isinstance(value, dict) else None
            inside += [chosen] if chosen else sections_in(field.annotation)
        models = inside
    return models


def _child(value: Any, piece: str | int) -> Any:
    try:
        return value[piece]
    except (KeyError, IndexError, TypeError):
        return None


_ELSEWHERE = ("evaluate", "check", "mesh")  # keys of evaluations and mesh axes are not suggested for other places


@cache
def _places() -> dict[str, tuple[str, ...]]:
    """Return the dotted paths of every key name; keys of list items contain `[]`."""
    found: dict[str, dict[str, None]] = {}

    def walk(model: type[Section], prefix: str) -> None:
        for name, field in model.model_fields.items():
            dotted = f"{prefix}{name}"
            found.setdefault(name, {})[dotted] = None
            inner = sections_in(field.annotation)
            for section in inner:
                walk(section, f"{dotted}." if field.annotation is section or variants(field) else f"{dotted}[].")

    walk(Config, "")
    return {name: tuple(places) for name, places in found.items()}


@cache
def homes() -> dict[str, tuple[str, ...]]:
    """Return the dotted paths of every key name (`r` -> `method.r`), without the names of unions."""
    return {
        name: tuple(place for place in places if "[]" not in place) or places  # a group's learning_rate is not usually meant
        for name, places in _places().items()
    }


def home_of(name: str, section: str | None) -> str | None:
    """Return the one key that `name` can mean when written in `section` (None: at the top); None if there is not exactly
    one."""
    places = homes().get(name, ())
    if len(places) != 1 or places[0].split(".")[0] in _ELSEWHERE or places[0].count(".") > 1 or "[]" in places[0]:
        return None
    of_items = any(place.startswith(f"{section}.") for place in _places()[name] if "[]" in place)  # data.revision: a source's
    return None if of_items or places[0] in section_fields() else places[0]


def _variants_with(section: str, key: str) -> list[str]:
    return [tag for tag, model in variants(section_fields()[section]).items() if key in model.model_fields]


def suggestion(path: Path, tree: Any) -> str:
    """Suggest a replacement for the unknown key at `path`."""
    key, parent = str(path[-1]), path[:-1]
    allowed = list(dict.fromkeys(name for model in models_at(parent, tree) for name in model.model_fields))
    if len(path) == 2 and path[0] in section_fields():
        field = section_fields()[str(path[0])]
        owners = _variants_with(str(path[0]), key)
        if owners:
            chosen = _child(_child(tree, path[0]), field.discriminator)
            name, names = f"{path[0]}.{field.discriminator}", ", ".join(owners)
            change = f"set {name} to {'one of them' if len(owners) > 1 else names}"
            return (
                f"it is a key of {path[0]} {names}, and {name} is {chosen}; {change}, remove it, "
                f"or replace the section: {path[0]}={{{field.discriminator}: {chosen}}}"
            )
    if len(path) == 1 and isinstance(_child(tree, key), dict):  # a misspelt section
        allowed = list(section_fields())
    elif others := homes().get(key, ()):
        return f"it belongs at {' or '.join(others)}"
    close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    far = difflib.get_close_matches(key, homes(), n=1, cutoff=0.75)
    if far:
        return f"did you mean {' or '.join(homes()[far[0]])}?"
    return f"known keys here: {', '.join(allowed)}" if allowed else "nothing can be set here"


def defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """Return every default of the schema as plain values, for the variants that `tree` names; required keys are absent."""
    return dict(_defaults(Config, tree))


def _defaults(model: type[Section], tree: Any) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        given = _child(tree, name)
        chosen = models_at((name,), tree) if model is Config and name in section_fields() else []
        if len(chosen) == 1:
            yield name, dict(_defaults(chosen[0], given))
        elif not field.is_required() and not chosen:
            value = field.get_default(call_default_factory=True)
            if isinstance(value, str | int | float | bool | None):
                yield name, value
