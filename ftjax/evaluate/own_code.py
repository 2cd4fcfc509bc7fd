"""Functions and classes of a user's own Python file."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftjax.errors import UserError


def public_functions(path: str, setting: str, expected: str) -> dict[str, Callable[..., Any]]:
    """Run a Python file and return the public functions that it defines, by name; see `_public`."""
    return _public(path, setting, expected, inspect.isfunction)


def public_classes(path: str, setting: str, expected: str) -> dict[str, type]:
    """Run a Python file and return the public classes that it defines, by name; see `_public`."""
    return _public(path, setting, expected, inspect.isclass)


def named(found: Mapping[str, Any], path: str, name: str, kinds: tuple[str, str], expected: str) -> Any:
    """Return what `FILE.py:NAME` names, or with an empty name the only one that there is.

    Args:
        found: what the file defines, by name.
        kinds: what one and several of them are called.
        expected: what the file should have, for errors.

    Raises UserError if there is none of that name, or without a name none or several.
    """
    if name in found:
        return found[name]
    if name or len(found) != 1:
        one, several = kinds
        wanted = f"no {one} {name}" if name else f"name one as FILE.py:{one.upper()}"
        raise UserError(f"{path}: {wanted}; {several} found: {', '.join(found) or 'none'}; {expected}")
    return next(iter(found.values()))


def _public(path: str, setting: str, expected: str, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Run a Python file and return what it defines of a kind.

    Args:
        setting: the key of the configuration that names the file.
        expected: what the file should have, for errors.

    Raises UserError if the file is missing or cannot be imported.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{setting}: {path}: no such file; {expected}")
    spec = importlib.util.spec_from_file_location("ftjax_own_code", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: it cannot be imported: {type(error).__name__}: {error}") from None
    return {
        name: value for name, value in vars(module).items()
        if wanted(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }  # fmt: skip
