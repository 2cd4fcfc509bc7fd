"""Finds ftjax's key for a key of another tool, or for one written in the wrong section."""

from collections.abc import Iterable
from typing import Any

from ftjax.config import Config
from ftjax.config.alias import ALIASES, EXPLAINED, MEANT, UNCLEAR, Alias, plain_name
from ftjax.config.schema import home_of, models_at, section_fields
from ftjax.config.yaml_text import Path


def switched(alias: Alias, value: Any) -> Any:
    """Return the target's value for a switch. Raises ValueError if the switch does not determine it."""
    if value is True:
        return alias.switch
    if value is False and alias.target == "model.quantization":
        return None
    expected, found = ("true", "false") if value is False else ("true or false", repr(value))
    raise ValueError(f"expected {expected}, found {found}; write {alias.target} itself")


def alias_at(path: Path) -> Alias | None:
    """Return the alias for the key at `path`, at the top level or in a section without a key of that name.

    It is another tool's name, or a key of ftjax that belongs in exactly one other section.
    """
    if len(path) == 1:
        real: Iterable[str] = Config.model_fields
    elif len(path) == 2 and path[0] in section_fields():
        real = [name for model in models_at(path[:1], {}) for name in model.model_fields]
    else:
        return None
    if path[-1] in real:
        return None
    name, section = plain_name(str(path[-1])), None if len(path) == 1 else str(path[0])
    if name in ALIASES or name in EXPLAINED or name in UNCLEAR or section in ("evaluate", "check"):
        return ALIASES.get(name)
    place = MEANT.get(name) or home_of(name, section)
    return Alias(place) if place else None
