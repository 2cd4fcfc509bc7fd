"""A user's own reward: a function in a Python file, with TRL's signature."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftjax.errors import UserError

EXPECTED = (
    "expected a function such as `def brevity(completions, **columns): return [...]`, which gets lists: prompts, completions, "
    "completion_ids and the columns of the data, and returns a number (or None) for each answer"
)


def load_reward(path: str, name: str | None = None) -> Callable[..., Any]:
    """Load a function of a file: the one with this name, or else the only public one.

    Raises UserError if there is none, or several.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"objective.rewards: {path}: no such file; {EXPECTED}")
    spec = importlib.util.spec_from_file_location("ftjax_own_reward", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: it cannot be imported: {type(error).__name__}: {error}") from None
    found = {
        key: value for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }  # fmt: skip
    if name is not None and name in found:
        return found[name]
    if name is not None or len(found) != 1:
        there = ", ".join(found) or "none"
        wanted = f"no function {name}" if name is not None else "name one as FILE.py:FUNCTION"
        raise UserError(f"{path}: {wanted}; functions found: {there}; {EXPECTED}")
    return next(iter(found.values()))
