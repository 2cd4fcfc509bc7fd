"""Configurations as callers give them in Python: a file, a dict or a `Config`, with overrides and data in memory."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ftjax.config import Config
from ftjax.config.load import config_of, load_config, print_note
from ftjax.config.moved import alias_at
from ftjax.data.memory import is_rows, keep
from ftjax.errors import UserError

Settings = str | os.PathLike[str] | Mapping[str, Any] | Config
DATA = {"data.train": "train", "data.validation": "validation", "evaluate.data": "evaluate"}  # keys that take rows in memory


def settings_of(
    config: Settings, overrides: Mapping[str, Any] | None = None, *, note: Callable[[str], None] = print_note
) -> Config:
    """Return the validated configuration.

    Args:
        config: the path of a YAML file, a dict with the same keys, or a `Config`.
        overrides: values by key, as `overrides_of` takes them.

    Raises UserError that names every mistake found.
    """
    changed = overrides_of(overrides or {})
    if isinstance(config, Config):
        if not changed:
            return config
        made = config_of(config.model_dump(mode="json", exclude_unset=True), changed, source="the configuration", note=note)
        given = [_target(tuple(key.split("."))) for key, _ in changed]
        made._unasked = frozenset(key for key in config.unasked if not any(f"{key}.".startswith(f"{one}.") for one in given))
        return made
    if isinstance(config, Mapping):
        return config_of(_plain((), config), changed, source="the configuration", note=note)
    if not isinstance(config, str | os.PathLike):
        raise UserError(f"expected a configuration as a path, a dict or a Config; found {type(config).__name__}")
    return load_config(os.fspath(config), changed, note=note)


def overrides_of(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return overrides for `load_config`: in `training__max_steps=100`, two underscores stand for the dot.

    A section's value replaces the section. Names that can mean one key only need no section: `learning_rate=1e-4`.
    """
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        key = name.replace("__", ".")
        found.append((key, _plain(tuple(key.split(".")), value)))
    return found


def _plain(path: tuple[str, ...], value: Any) -> Any:
    """Return the value as a configuration file would hold it; rows in memory are kept and named."""
    key = _target(path)
    if key in DATA:
        return _named(value, DATA[key])
    if isinstance(value, Mapping):
        return {str(name): _plain((*path, str(name)), item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain((*path, "0"), item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _target(path: tuple[str, ...]) -> str:
    """Return the dotted key that is meant, which may be written as another tool's."""
    alias = alias_at(path) if path else None
    return ".".join(path) if alias is None else alias.target


def _named(value: Any, label: str) -> Any:
    if is_rows(value):
        return keep(value, label)
    if isinstance(value, list | tuple):
        return [_named(one, f"{label}{number}") for number, one in enumerate(value)]
    if isinstance(value, Mapping) and "path" in value:
        return {**value, "path": _named(value["path"], label)}
    return os.fspath(value) if isinstance(value, os.PathLike) else value
