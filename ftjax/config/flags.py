"""Configuration keys as command-line flags: `--learning_rate 2e-4`, as other tools have them."""

import difflib
import re
from collections.abc import Collection, Sequence

from ftjax.config import Config
from ftjax.config.alias import ALIASES, EXPLAINED, plain_name
from ftjax.config.schema import homes, section_fields

_FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_ASSIGNED = re.compile(r"([A-Za-z][\w.-]*)=")


def as_overrides(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Convert `--key value`, `--key=value` and `--key` (true) to `key=value` at the end; other arguments stay unchanged.

    Args:
        options: the command line's own flags. They stay unchanged, and so do flags that resemble one of them more than a
            key.
    """
    found, assigned, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        flag = _FLAG.fullmatch(argument)
        if argument == "--":
            found += [argument, *rest]
            break
        if flag is None or f"--{flag[1].replace('_', '-')}" in options or not _is_key(flag[1], options):
            found.append(argument)
            continue
        value = flag[2]
        if value is None:
            value = rest.pop(0) if rest and not _begins_anew(rest[0]) else "true"
        if value in ("True", "False", "None"):  # as Python tools write them
            value = {"True": "true", "False": "false", "None": "null"}[value]
        assigned.append(f"{flag[1].replace('-', '_')}={value}")
    return [*found, *assigned]


def _begins_anew(argument: str) -> bool:
    """Return whether an argument starts something new instead of being the value of a flag: a flag, a `key=value`, or the
    configuration."""
    assigned = _ASSIGNED.match(argument)
    return argument.startswith("--") or argument.endswith((".yaml", ".yml")) or bool(assigned and _is_key(assigned[1], ()))


def _is_key(name: str, options: Collection[str]) -> bool:
    """Return whether it is a key of ftjax or another tool, or resembles one, so that errors are reported for the key."""
    first, *deeper = name.split(".")
    if deeper:
        return first in section_fields()
    plain = plain_name(name)
    known = {*ALIASES, *EXPLAINED, *homes(), *Config.model_fields}
    if plain in known:
        return True
    closest = difflib.get_close_matches(f"--{name}", [*options, *(f"--{key}" for key in known)], n=1, cutoff=0.8)
    return bool(closest) and closest[0] not in options
