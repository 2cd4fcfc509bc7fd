"""Every key of the configuration, from the schema: type, default, meaning, and other tools' names of it."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from ftjax.config import Config, Section
from ftjax.config.alias import ALIASES, EXPLAINED, plain_name
from ftjax.config.load import shown_value
from ftjax.config.schema import homes, section_fields, sections_in, variants
from ftjax.errors import UserError

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true | false", object: "values"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "pattern": "like"}
REQUIRED = "required"


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: dotted; `[]` after the name of a list whose items have keys.
        variant: the method or objective that has it; None if the section has one form.
        default: as a configuration file has it; `required` if there is none.
        aliases: names of other tools that are read as this key.
    """

    name: str
    type: str
    default: str
    meaning: str
    variant: str | None = None
    aliases: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A section, or one of its forms (a method, an objective), with its keys."""

    name: str
    variant: str | None
    meaning: str
    keys: list[Key]


def parts() -> list[Part]:
    """Return all sections in the order of the schema, and the forms of those that have several."""
    found = []
    for name, info in Config.model_fields.items():
        if name not in section_fields():
            found.append(Part(name, None, "", [_key(name, info)]))
            continue
        forms = variants(info) or {None: sections_in(info.annotation)[0]}
        for variant, model in forms.items():
            found.append(Part(name, variant, _first_sentence(model), list(_keys(model, f"{name}.", variant))))
    return found


def look_up(asked: str | None) -> tuple[list[Part], str]:
    """Return what `asked` means and a note: a section, a method, an objective, a key (with or without its section), or another
    tool's name.

    Raises UserError for a name that nothing has, with the nearest ones.
    """
    everything = parts()
    if asked is None:
        return everything, ""
    name = asked.strip().removesuffix(":")
    whole = [part for part in everything if name in (part.name, part.variant, f"{part.name}.{part.variant}")]
    if whole:
        return whole, ""
    word = plain_name(name.rpartition(".")[2])
    explained = f"{word}, as a key of other tools: {EXPLAINED[word]}" if word in EXPLAINED else ""
    found, alias = _with_key(everything, name), ALIASES.get(word)
    if alias is not None and not any(key.name == alias.target for part in found for key in part.keys):
        return [*_with_key(everything, alias.target), *found], f"{word} is read as {alias.target}"
    if found:
        return found, explained
    if explained:
        raise UserError(explained)
    known = dict.fromkeys([*section_fields(), *homes(), *(part.variant for part in everything if part.variant), *ALIASES])
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=3, cutoff=0.6)
    advice = f"did you mean {' or '.join(near)}?" if near else f"sections: {', '.join(section_fields())}"
    raise UserError(f"config: there is no section or key {name!r}; {advice}")


def _with_key(everything: list[Part], name: str) -> list[Part]:
    """Return the parts that have a key of this name, with this key alone."""
    found = []
    for part in everything:
        keys = [key for key in part.keys if name in (key.name, key.name.partition(".")[2], key.name.rpartition(".")[2])]
        exact = [key for key in keys if key.name == name]
        if exact or keys:
            found.append(Part(part.name, part.variant, part.meaning, exact or keys))
    whole = [part for part in found if any(key.name == name for key in part.keys)]
    return whole or found


def _keys(model: type[Section], prefix: str, variant: str | None, seen: set[type[Section]] | None = None) -> Iterator[Key]:
    """Yield the keys of a section and of the sections in it, each of which is described once."""
    seen = set() if seen is None else seen
    for name, info in model.model_fields.items():
        if variant is not None and f"{prefix}{name}".count(".") == 1 and name == "name":
            continue  # the form itself
        yield _key(f"{prefix}{name}", info, variant)
        for inner in dict.fromkeys(sections_in(info.annotation)):
            if inner not in seen:
                seen.add(inner)
                yield from _keys(inner, f"{prefix}{name}{'' if info.annotation is inner else '[]'}.", variant, seen)


def _key(dotted: str, info: FieldInfo, variant: str | None = None) -> Key:
    default = REQUIRED if info.is_required() else shown_value(info.get_default(call_default_factory=True))
    if sections_in(info.annotation) and default not in (REQUIRED, "null", "[]"):
        default = "its defaults"
    return Key(dotted, _type(info), default, info.description or "", variant, _names_of_others().get(dotted, []))


@cache
def _names_of_others() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, alias in ALIASES.items():
        found.setdefault(alias.target, []).append(name)
    return found


def _type(info: FieldInfo) -> str:
    bounds = []
    for one in info.metadata:
        for name, words in _BOUNDS.items():
            if (bound := getattr(one, name, None)) is not None:
                bounds.append(f"{words} {bound:g}" if isinstance(bound, float) else f"{words} {bound}")
    kind = info.annotation
    nullable = type(None) in get_args(kind)
    words = ", ".join([_words(kind), *bounds])
    if not nullable:
        return words
    return f"{words} | null" if " | " in words else f"{words}{',' if bounds else ''} or null"


def _words(kind: Any) -> str:
    """Return a type in words, without null: `a whole number`, `adamw | adafactor`, `a list of texts`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _NAMES:
        return _NAMES[kind]
    if origin is Literal:
        return " | ".join(shown_value(value) for value in arguments)
    if origin in (list, tuple):
        inner = dict.fromkeys(_words(argument) for argument in arguments if argument is not Ellipsis)
        return f"a list of {' and '.join(map(_plural, inner))}"
    if origin is dict:
        return f"a mapping to {_plural(_words(arguments[1]))}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return "a mapping"
    if hasattr(kind, "__metadata__"):
        return _words(arguments[0])
    return " or ".join(dict.fromkeys(_words(argument) for argument in arguments if argument is not type(None))) or str(kind)


def _plural(words: str) -> str:
    """`a text` -> `texts`; alternatives in brackets."""
    if " | " in words or " or " in words:
        return f"({words})"
    first, _, rest = words.removeprefix("a ").partition(" to ")
    if first.startswith("list of "):
        return f"lists of {first.removeprefix('list of ')}"
    return f"{first.removesuffix('s')}s{' to ' if rest else ''}{rest}"


def _first_sentence(model: type[Section]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())
