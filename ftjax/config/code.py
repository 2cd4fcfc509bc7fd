"""Settings that run a Python file, and who set them.

A run folder may come from anybody: its config.yaml records how the run was made and does not permit running code here. The
command line and the user's own configuration files do.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftjax.errors import UserError

if TYPE_CHECKING:
    from ftjax.config import Config

RECORDED = "config.yaml"  # as written by a run
OF_A_RUN = ("final", "best", "checkpoints", "metrics.jsonl", "run.json")


def _files(tasks: list[str]) -> bool:
    return any(task.endswith(".yaml") for task in tasks)


def _rewards(specs: list[Any]) -> bool:
    return any(spec.is_code for spec in specs)


# A task of lm-evaluation-harness is a YAML file in which `!function` names Python code beside it or in a tasks folder.
LEADS_TO_CODE: dict[str, Callable[[Any], bool]] = {
    "evaluate.task": lambda task: task.endswith(".py"),
    "evaluate.lm_eval.tasks": _files,
    "evaluate.lm_eval.include_path": bool,
    "check.lm_eval_tasks": _files,
    "objective.rewards": _rewards,
    "objective.environment": bool,
}


def is_recorded(path: Path) -> bool:
    """Return whether a run wrote this configuration into its folder."""
    return path.name == RECORDED and any((path.parent / name).exists() for name in OF_A_RUN)


def setting(config: "Config", key: str) -> Any:
    """Return the value at a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def refuse_unasked(config: "Config", *keys: str) -> None:
    """Raise UserError if one of these settings runs code that only a run's folder names."""
    for key in keys:
        value = setting(config, key)
        if key not in config.unasked or not LEADS_TO_CODE[key](value):
            continue
        names = [getattr(one, "name", one) for one in value] if isinstance(value, list) else []
        text = f"[{', '.join(names)}]" if names else str(value)
        raise UserError(
            f"{key}: {text} is Python code that would run here, and only the run's own config.yaml names it, which may be "
            f"somebody else's. Read the file, then name it on the command line: {shlex.quote(f'{key}={text}')}; or choose "
            f"something else there"
        )
