"""Reward functions: those of the configuration, loaded once, and their values for a batch of answers."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from ftjax.config import Config
from ftjax.config.code import refuse_unasked
from ftjax.config.rewards import RewardSpec
from ftjax.errors import UserError
from ftjax.rl.builtin import BUILTIN, TASKS, needs_reference, task_reward
from ftjax.rl.environment import Environments
from ftjax.rl.own import OwnReward, load_reward
from ftjax.rl.own_calls import call_within, checked, on_first
from ftjax.rl.prompts import Question
from ftjax.rl.reward_model import RewardModel
from ftjax.rl.rollout import Function, Rollout


@dataclass(frozen=True)
class Reward:
    """A reward function with the name under which it is logged."""

    name: str
    function: Function


LARGEST = 1e18  # of values; the squares of their differences are float32
ENVIRONMENT = "environment"  # the reward that the environment gives


def load_rewards(config: Config, allow_code_execution: bool = False, environments: Environments | None = None) -> list[Reward]:
    """Load the reward functions of a configuration.

    Args:
        environments: those with which answers are dialogues.

    Raises UserError for an unknown name, wrong options, or code that the user has not asked for.
    """
    specs = config.objective.rewards
    if not specs:
        raise UserError(
            "objective.rewards: there is none, so there is nothing to learn from; name one, such as [exact_match]. There are "
            f"{_known()}"
        )
    refuse_unasked(config, "objective.rewards")
    if any(spec.name == "code" for spec in specs) and not allow_code_execution:
        raise UserError(
            "objective.rewards: code runs programs that the model wrote, in processes with limits on time and memory and "
            "without the network, but as this user; to do that, pass --allow-code-execution"
        )
    found = [Reward(*_function(spec, environments)) for spec in specs]
    names = [reward.name for reward in found]
    return [
        Reward(f"{one.name}-{names[:at].count(one.name) + 1}" if names.count(one.name) > 1 else one.name, one.function)
        for at, one in enumerate(found)
    ]


def _known() -> str:
    return f"{', '.join([*TASKS, *BUILTIN, ENVIRONMENT])}, FILE.py:FUNCTION for one of yours, and the folder of a reward model"


def _function(spec: RewardSpec, environments: Environments | None) -> tuple[str, Function]:
    path, _, name = spec.name.partition(":")
    if spec.name == ENVIRONMENT:
        if environments is None or not environments.gives_rewards:
            wrong = "there is no objective.environment" if environments is None else f"{environments.name} has no get_reward"
            raise UserError(f"objective.rewards: environment is what the get_reward of an environment returns, and {wrong}")
        return environments.name, environments.rewards
    if spec.is_code:
        if spec.options:
            raise UserError(f"objective.rewards: {spec.name}: options are arguments of built-in rewards; a file has its own")
        function = load_reward(path, name or None)
        return function.__name__, OwnReward(function, environments)
    if spec.name in TASKS:
        return spec.name, task_reward(spec.name, spec.options)
    if spec.name in BUILTIN:
        made = BUILTIN[spec.name]
        takes = inspect.signature(made).parameters
        unknown = [option for option in spec.options if option not in takes]
        missing = [one.name for one in takes.values() if one.default is one.empty and one.name not in spec.options]
        if unknown or missing:
            wrong = [*(f"unknown: {name}" for name in unknown), *(f"missing: {name}" for name in missing)]
            raise UserError(
                f"objective.rewards: {spec.name} takes the options {', '.join(takes) or '(none)'}; {'; '.join(wrong)}"
            )
        try:
            return spec.name, made(**spec.options)
        except (TypeError, ValueError) as error:
            raise UserError(f"objective.rewards: {spec.name}: {error}") from None
    if Path(spec.name).expanduser().is_dir():
        return Path(spec.name).expanduser().resolve().name, RewardModel(spec.name, **_model_options(spec))
    raise UserError(f"objective.rewards: {spec.name}: there is no such reward; there are {_known()}")


def _model_options(spec: RewardSpec) -> dict[str, Any]:
    known = inspect.signature(RewardModel).parameters
    if unknown := [name for name in spec.options if name not in known or name == "folder"]:
        raise UserError(
            f"objective.rewards: {spec.name}: a reward model takes the options {', '.join([*known][1:])}; unknown: "
            f"{', '.join(unknown)}"
        )
    return spec.options


def refuse_without_answers(specs: Sequence[RewardSpec], questions: Sequence[Question]) -> None:
    """Raise UserError, with file and line, for a row without what a reward compares with."""
    for spec in specs:
        for question in questions if needs_reference(spec.name) else ():
            if not question.item.example.references:
                raise UserError(
                    f"{question.item.where}: the reward {spec.name} compares with the answer of the row, and it has none; "
                    "expected a column completion, answer, solution, ground_truth or references, or an assistant's last message"
                )


def shared_rewards(
    rewards: Sequence[Reward], rollouts: Sequence[Rollout], timeout: float, step: int = 0
) -> Float32[np.ndarray, "N F"]:
    """Compute `rewards_of` on the first process. Raises its UserError on all of them, so that all can save their state."""
    values = on_first("rewards", lambda: rewards_of(rewards, rollouts, timeout, step).tolist())
    return np.array(values, np.float32).reshape(len(rollouts), len(rewards))


def rewards_of(
    rewards: Sequence[Reward], rollouts: Sequence[Rollout], timeout: float, step: int = 0
) -> Float32[np.ndarray, "N F"]:
    """Return the value of each function for each answer; NaN where it has nothing to say.

    Raises UserError, with function and prompt, if one raises, does not end, or returns anything but a number for each answer.
    """
    found = np.full((len(rollouts), len(rewards)), np.nan, np.float32)
    for column, reward in enumerate(rewards):
        if isinstance(reward.function, OwnReward):
            reward.function.step = step
        for row, value in enumerate(_values(reward, rollouts, timeout)):
            found[row, column] = np.nan if value is None else value
    return found


def _values(reward: Reward, rollouts: Sequence[Rollout], timeout: float) -> Sequence[float | None]:
    first = rollouts[0]
    about = f"for {len(rollouts)} answers, the first to the prompt of {first.item.where}: {first.shown_prompt[:200]!r}"
    ended = call_within(timeout, f"reward-{reward.name}", partial(reward.function, rollouts))
    return _checked(reward, checked(ended, f"reward {reward.name}", about, timeout), rollouts)


def _checked(reward: Reward, values: Any, rollouts: Sequence[Rollout]) -> Sequence[float | None]:
    values = values.tolist() if hasattr(values, "tolist") else values  # of NumPy or PyTorch
    if isinstance(values, Sequence) and not isinstance(values, str):
        values = [value.item() if np.ndim(value) == 0 and hasattr(value, "item") else value for value in values]
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(rollouts):
        count = f"{len(values)} values" if hasattr(values, "__len__") else f"{values!r:.60}"
        raise UserError(
            f"reward {reward.name}: it returned {count} for {len(rollouts)} answers, the first to the prompt of "
            f"{rollouts[0].item.where}; expected a list with a number for each"
        )
    for value, rollout in zip(values, rollouts, strict=True):
        if value is not None and not (isinstance(value, Real) and abs(value) <= LARGEST):
            raise UserError(
                f"reward {reward.name}: it returned {value!r:.60} for an answer to the prompt of {rollout.item.where}; "
                f"expected a number from {-LARGEST:g} to {LARGEST:g}, or None if there is nothing to say. The answer: "
                f"{rollout.text[:200]!r}"
            )
    return values
