"""Settings that lead to running a Python file, and who named them.

A run folder may be anybody's: its config.yaml says how the run was made, and is no permission to run code here. What the
command line or a configuration file of the user's own names is one.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftjax.errors import UserError

if TYPE_CHECKING:
    from ftjax.config import Config

RECORDED = "config.yaml"  # as a run writes it
OF_A_RUN = ("final", "best", "checkpoints", "metrics.jsonl", "run.json")


def _files(tasks: list[str]) -> bool:
    return any(task.endswith(".yaml") for task in tasks)


# Tasks of lm-evaluation-harness are YAML in which `!function` names Python, beside them or in a folder of tasks.
LEADS_TO_CODE: dict[str, Callable[[Any], bool]] = {
    "evaluate.task": lambda task: task.endswith(".py"),
    "evaluate.lm_eval.tasks": _files,
    "evaluate.lm_eval.include_path": bool,
    "check.lm_eval_tasks": _files,
}


def is_recorded(path: Path) -> bool:
    """Whether this configuration is the one that a run has written into its folder."""
    return path.name == RECORDED and any((path.parent / name).exists() for name in OF_A_RUN)


def setting(config: "Config", key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def refuse_unasked(config: "Config", *keys: str) -> None:
    """UserError where one of these settings leads to code that nobody but a run's own folder has named."""
    for key in keys:
        value = setting(config, key)
        if key not in config.unasked or not LEADS_TO_CODE[key](value):
            continue
        text = f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
        raise UserError(
            f"{key}: {text} is Python code that would run here, and only the run's own config.yaml names it, which may be "
            f"somebody else's. Read the file, then name it on the command line: {shlex.quote(f'{key}={text}')}; or choose "
            f"something else there"
        )
