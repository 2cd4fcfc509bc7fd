"""Resolves `${section.key}` in values by OmegaConf's rules: keys, relative keys (`${.r}`) and the environment
(`${oc.env:NAME}`).

A reference may name a key that the file leaves at its default. `\\${` is a literal `${`.
"""

import re
from collections.abc import Callable
from typing import Any

from ftjax.config.yaml_text import Path

_REFERENCE = re.compile(r"(\\*)\$\{")
_TO_KEY = re.compile(r"\$\{[\w.\[\]]+\}")  # without a resolver such as `oc.env:`, and without a reference inside


def escape(value: Any) -> Any:
    """Escape a value so that `interpolate` returns it unchanged."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    return [escape(item) for item in value] if isinstance(value, list) else value


def resolvers(tree: dict[str, Any]) -> list[tuple[Path, str]]:
    """Return `(path, value)` of the values whose references may read more than the keys of `tree`."""
    return [
        (path, text)
        for path, text in _strings(tree, ())
        if any(len(m[1]) % 2 == 0 and not _TO_KEY.match(text, m.end(1)) for m in _REFERENCE.finditer(text))
    ]


def interpolate(tree: dict[str, Any], defaults: dict[str, Any], report: Callable[[Path, str], None]) -> dict[str, Any]:
    """Return a copy of `tree` without references; call `report(path, message)` for each that cannot be resolved."""
    if not any(_REFERENCE.search(text) for _, text in _strings(tree, ())):
        return tree
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    broken: set[Path] = set()
    for path, text in _strings(tree, ()):
        try:
            OmegaConf.create({"value": text})
        except OmegaConfBaseException as error:
            broken.add(path)
            report(path, f"{text!r} is not a reference: {_first_line(error)} (a literal ${{ is written \\${{)")
    lookup = OmegaConf.create(_merged(defaults, _without(tree, broken, ())))

    def resolve(value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: resolve(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [resolve(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or not _REFERENCE.search(value) or path in broken:
            return value
        try:
            found = _at(lookup, path)
        except (OmegaConfBaseException, ValueError, RecursionError) as error:
            report(path, f"{value!r} cannot be resolved: {_first_line(error)}")
            return value
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found

    return resolve(tree, ())


def _at(node: Any, path: Path) -> Any:
    for piece in path:
        node = node[piece]
    return node


def _strings(value: Any, path: Path) -> list[tuple[Path, str]]:
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _strings(item, (*path, key))]
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in _strings(item, (*path, index))]
    return [(path, value)] if isinstance(value, str) and "${" in value else []


def _without(value: Any, broken: set[Path], path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, broken, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, broken, (*path, index)) for index, item in enumerate(value)]
    return None if path in broken else value


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
