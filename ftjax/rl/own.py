"""A user's own reward: a function in a Python file, with TRL's signature."""

import asyncio
import inspect
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from ftjax.evaluate.own_code import named, public_functions
from ftjax.rl.environment import Environments
from ftjax.rl.rollout import Rollout

EXPECTED = (
    "expected a function such as `def brevity(completions, **columns): return [...]`, which gets lists: prompts, completions, "
    "completion_ids and the columns of the data, and returns a number (or None) for each answer"
)


def load_reward(path: str, name: str | None = None) -> Callable[..., Any]:
    """Load a function of a file: the one with this name, or else the only public one.

    Raises UserError if there is none, or several.
    """
    return named(public_functions(path, "objective.rewards", EXPECTED), path, name or "", ("function", "functions"), EXPECTED)


class OwnReward:
    """Calls a function with what TRL gives it: prompts, completions, completion_ids, the other columns of the data, and if it
    names them `environments` (those of the answers), `trainer_state`, `log_metric` and `log_extra`.

    Attributes:
        step: update for which answers are rewarded.
        metrics, columns: what the last call has logged: numbers by name, and a value for each answer by name.
    """

    def __init__(self, function: Callable[..., Any], environments: Environments | None = None):
        self._environments = environments
        self._function, self._takes = function, inspect.signature(function).parameters
        self._every = any(one.kind is one.VAR_KEYWORD for one in self._takes.values())
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.columns: dict[str, list[Any]] = {}

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[float | None]:
        self.metrics, self.columns = {}, {}
        names = dict.fromkeys(name for one in rollouts for name in one.item.values)
        given: dict[str, Any] = {
            name: [one.item.values.get(name) for one in rollouts] for name in names if name not in ("prompt", "completion")
        }
        given |= {
            "prompts": [one.prompt for one in rollouts], "completions": [one.completion for one in rollouts],
            "completion_ids": [list(one.tokens) for one in rollouts],
            "trainer_state": SimpleNamespace(global_step=self.step),
            "log_metric": self._log_metric, "log_extra": self._log_extra,
        }  # fmt: skip
        if self._environments is not None:
            given["environments"] = self._environments.current
        values = self._function(**{name: value for name, value in given.items() if self._every or name in self._takes})
        return asyncio.run(values) if inspect.iscoroutine(values) else values

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics[name] = float(value)

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.columns[column] = list(values)


def logged_beside(functions: Iterable[Any], count: int) -> list[dict[str, Any]]:
    """Return what the last calls of own functions have logged beside each of `count` answers, by name."""
    columns = {name: one for function in functions if isinstance(function, OwnReward) for name, one in function.columns.items()}
    return [{name: column[number] for name, column in columns.items() if number < len(column)} for number in range(count)]
