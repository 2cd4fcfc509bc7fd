"""Evaluation while training from rewards: the mean reward of answers to the validation prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ftjax.config.load import print_note
from ftjax.generate.finite import NotFinite
from ftjax.rl.metrics import answer_metrics
from ftjax.rl.prompts import Prompts
from ftjax.rl.rewards import Reward, shared_rewards
from ftjax.rl.sampler import Sampler
from ftjax.train.observer import Observation, Observer
from ftjax.train.setup import Setup

SHOWN = 4  # answers that are logged


class RewardObserver:
    """Answers the validation prompts once each, with the sampling of training, and rewards the answers."""

    def __init__(
        self, setup: Setup, prompts: Prompts | None, sampler: Sampler, rewards: Sequence[Reward], other: Observer | None
    ):
        """Args: prompts: of the validation data; None for none. other: is called, too."""
        self._setup, self._sampler, self._rewards, self._other = setup, sampler, rewards, other
        self._prompts = prompts
        self._questions = [] if prompts is None else list(prompts.questions.values())

    @property
    def facts(self) -> dict[str, Any]:
        """Digests of prompts and rows, which must be equal on all processes of a run."""
        facts = {} if self._prompts is None else {f"validation: {name}": one for name, one in self._prompts.facts.items()}
        return facts | (self._other.facts if self._other is not None else {})

    def __call__(self, params: Mapping[str, jax.Array]) -> Observation:
        """Evaluate the model. Args: params: all parameters, trained and frozen."""
        other = self._other(params) if self._other is not None else Observation({}, [])
        if not self._questions:
            return other
        try:
            metrics, texts = self._rewarded(params)
        except NotFinite as error:  # training continues: updates that are not finite are skipped and counted
            if jax.process_index() == 0:
                print_note(f"no reward: {error}")
            metrics, texts = {"eval/reward": math.nan}, []
        return Observation({**other.metrics, **metrics}, [*other.texts, *texts])

    def _rewarded(self, params: Mapping[str, jax.Array]) -> tuple[dict[str, float], list[dict[str, str]]]:
        section = self._setup.config.objective
        rollouts = self._sampler.answer(params, self._questions, 0, count=1)
        values = shared_rewards(self._rewards, rollouts, section.reward_timeout)
        weights = np.array([spec.weight for spec in section.rewards])
        totals = np.where(np.isnan(values).all(axis=1), np.nan, np.nansum(values * weights, axis=1))
        found = {"eval/reward": _mean(totals)}
        found |= {f"eval/rewards/{one.name}/mean": _mean(values[:, at]) for at, one in enumerate(self._rewards)}
        found |= {f"eval/{name}": value for name, value in answer_metrics(rollouts).items()}
        texts = [
            {"prompt": one.shown_prompt, "text": one.shown, "reward": f"{total:.4g}"}
            for one, total in zip(rollouts[:SHOWN], totals, strict=False)
        ]
        return found, texts


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else math.nan
