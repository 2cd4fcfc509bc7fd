"""What `ftjax.train.run.train` needs to learn from generated answers: the source of its batches, and the observer of its
evaluations."""

from typing import Any

from ftjax.config import Config
from ftjax.config.rewards import Rollouts
from ftjax.data.pipeline import PackedSplit
from ftjax.distributed.agree import agree
from ftjax.evaluate.observe import make_observer
from ftjax.objectives import encoding_of, generates
from ftjax.rl.distill import LessonBatches, LessonObserver
from ftjax.rl.environment import load_environments
from ftjax.rl.observe import RewardObserver
from ftjax.rl.prompts import Prompts
from ftjax.rl.rewards import load_rewards, refuse_without_answers
from ftjax.rl.sampler import Sampler
from ftjax.rl.source import RolloutBatches
from ftjax.train.observer import Observer
from ftjax.train.setup import Setup


class Learning:
    """Rewards of a configuration, loaded before the model is; a teacher needs none.

    learning = Learning(config)
    train(config, make_observer=learning.make_observer, make_source=learning.make_source)
    """

    def __init__(self, config: Config, allow_code_execution: bool = False):
        """Load the rewards of an objective that generates. Raises UserError for whatever is wrong with them."""
        rewarded = isinstance(config.objective, Rollouts)
        self._environments = load_environments(config) if rewarded else None
        self._rewards = load_rewards(config, allow_code_execution, self._environments) if rewarded else []
        self._sampler: Sampler | None = None

    def make_source(self, setup: Setup, tokenizer: Any, split: PackedSplit) -> RolloutBatches | LessonBatches:
        """Build the source of batches from the prompts of a run."""
        if not self._rewards:
            return LessonBatches(setup, split, self._sampler_of(setup, tokenizer), tokenizer)
        prompts = self._prompts(setup, split, "train")
        agree("the rows of the prompts", prompts.facts)
        return RolloutBatches(setup, prompts, self._sampler_of(setup, tokenizer), self._rewards, self._environments)

    def make_observer(self, setup: Setup, tokenizer: Any, validation: PackedSplit | None) -> Observer | None:
        """Build the observer; None if the configuration asks for nothing."""
        other = make_observer(setup, tokenizer, validation)
        if validation is None or not generates(setup.config) or encoding_of(setup.config).imitated:
            return other
        if not self._rewards:
            return LessonObserver(setup, validation, self._sampler_of(setup, tokenizer), other)
        which = "train" if setup.config.data.validation_split is not None else "validation"
        prompts = self._prompts(setup, validation, which)
        return RewardObserver(setup, prompts, self._sampler_of(setup, tokenizer), self._rewards, other)

    def _prompts(self, setup: Setup, split: PackedSplit, which: str) -> Prompts:
        found = Prompts(split, setup.config.data.sources(which), setup.config)
        refuse_without_answers(setup.config.objective.rewards, list(found.questions.values()))
        return found

    def _sampler_of(self, setup: Setup, tokenizer: Any) -> Sampler:
        """Return the sampler, which training and evaluation share with its compiled programs."""
        if self._sampler is None:
            self._sampler = Sampler(setup, tokenizer, self._environments)
        return self._sampler
