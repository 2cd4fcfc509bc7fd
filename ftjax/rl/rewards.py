"""Reward functions: those of the configuration, loaded once, and their values for a batch of answers."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ftjax.config.rewards import RewardSpec
from ftjax.errors import UserError
from ftjax.evaluate.rows import Item
from ftjax.rl.builtin import BUILTIN, TASKS, task_reward
from ftjax.rl.own import load_reward

TIMEOUT = 600.0  # seconds that one reward function may take for a batch


@dataclass(frozen=True)
class Rollout:
    """One answer of the model.

    Attributes:
        item: the row with its prompt.
        prompt: as the row has it: a text or messages.
        text: the answer without the token that ended it.
        tokens: with that token.
        logprobs: of each token, for the sampler.
        truncated: whether it reached the limit.
    """

    item: Item
    prompt: str | Sequence[Mapping[str, Any]]
    prompt_ids: Sequence[int]
    text: str
    tokens: Sequence[int]
    logprobs: Sequence[float]
    truncated: bool

    @property
    def completion(self) -> str | list[dict[str, str]]:
        """The answer as TRL gives it to reward functions: a text, or a message where the prompt is messages."""
        return self.text if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.text}]


# rollouts -> a number for each, or None where there is nothing to say
Function = Callable[[Sequence[Rollout]], Sequence[float | None]]


@dataclass(frozen=True)
class Reward:
    """A reward function with the name under which it is logged."""

    name: str
    function: Function


def load_rewards(specs: Sequence[RewardSpec]) -> list[Reward]:
    """Load the reward functions of a configuration. Raises UserError for an unknown name or wrong options."""
    if not specs:
        raise UserError(
            "objective.rewards: there is none, so there is nothing to learn from; name one, such as "
            f"{{name: exact_match}}. There are {', '.join([*TASKS, *BUILTIN])}, or FILE.py with a function of yours"
        )
    found = [Reward(*_function(spec)) for spec in specs]
    names = [reward.name for reward in found]
    return [
        Reward(f"{reward.name}-{names[:at].count(reward.name) + 1}" if names.count(reward.name) > 1 else reward.name, reward.function)
        for at, reward in enumerate(found)
    ]  # fmt: skip


def _function(spec: RewardSpec) -> tuple[str, Function]:
    path, _, name = spec.name.partition(":")
    if path.endswith(".py"):
        if spec.options:
            raise UserError(f"objective.rewards: {spec.name}: options are arguments of built-in rewards; a file has its own")
        function = load_reward(path, name or None)
        return function.__name__, _of_columns(function)
    if spec.name in TASKS:
        return spec.name, task_reward(spec.name, spec.options)
    if spec.name in BUILTIN:
        made = BUILTIN[spec.name]
        takes = inspect.signature(made).parameters
        unknown = [option for option in spec.options if option not in takes]
        missing = [one.name for one in takes.values() if one.default is one.empty and one.name not in spec.options]
        if unknown or missing:
            raise UserError(
                f"objective.rewards: {spec.name} takes the options {', '.join(takes) or '(none)'}; "
                + "; ".join([f"unknown: {name}" for name in unknown] + [f"missing: {name}" for name in missing])
            )
        return spec.name, made(**spec.options)
    if Path(spec.name).expanduser().is_dir():
        raise UserError(f"objective.rewards: {spec.name}: reward models are not supported yet")
    raise UserError(f"objective.rewards: {spec.name}: no such reward; there are {', '.join([*TASKS, *BUILTIN])}, or FILE.py")


def _of_columns(function: Callable[..., Any]) -> Function:
    """Call a function with TRL's signature: prompts, completions, completion_ids, and the other columns of the data."""
    takes = inspect.signature(function).parameters
    every = any(one.kind is one.VAR_KEYWORD for one in takes.values())

    def call(rollouts: Sequence[Rollout]) -> Sequence[float | None]:
        columns = dict.fromkeys(name for one in rollouts for name in one.item.values)
        given = {
            name: [one.item.values.get(name) for one in rollouts] for name in columns if name not in ("prompt", "completion")
        }
        given |= {
            "prompts": [one.prompt for one in rollouts], "completions": [one.completion for one in rollouts],
            "completion_ids": [list(one.tokens) for one in rollouts],
        }  # fmt: skip
        return function(**{name: value for name, value in given.items() if every or name in takes})

    return call


def rewards_of(rewards: Sequence[Reward], rollouts: Sequence[Rollout], timeout: float = TIMEOUT) -> Float[np.ndarray, "N F"]:
    """Return the value of each function for each answer; NaN where it has nothing to say.

    Raises UserError, with function and prompt, if one raises, does not end, or returns anything but a number for each answer.
    """
    found = np.full((len(rollouts), len(rewards)), np.nan, np.float32)
    for column, reward in enumerate(rewards):
        for row, value in enumerate(_values(reward, rollouts, timeout)):
            found[row, column] = np.nan if value is None else value
    return found


def _values(reward: Reward, rollouts: Sequence[Rollout], timeout: float) -> Sequence[float | None]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="reward")
    first = rollouts[0].item.where
    try:
        values = pool.submit(reward.function, rollouts).result(timeout)
    except Late:
        raise UserError(
            f"reward {reward.name}: it has not ended after {timeout:.0f} s, for {len(rollouts)} answers, the first to the "
            f"prompt of {first}"
        ) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"reward {reward.name}: {type(error).__name__}: {error} (for {len(rollouts)} answers, the first to the prompt of "
            f"{first})"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str) or len(values) != len(rollouts):
        count = len(values) if hasattr(values, "__len__") else type(values).__name__
        raise UserError(f"reward {reward.name}: it returned {count} values for {len(rollouts)} answers; expected one for each")
    for value, rollout in zip(values, rollouts, strict=True):
        if value is not None and not (isinstance(value, Real | np.generic) and math.isfinite(value)):
            raise UserError(
                f"reward {reward.name}: {value!r} for an answer to the prompt of {rollout.item.where}; expected a finite number, "
                f"or None if there is nothing to say. The answer: {rollout.text[:200]!r}"
            )
    return values
