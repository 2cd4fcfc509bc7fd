"""Batches of answers that the model in training generates: prompts, answers, rewards, advantages, rows.

A batch of `training.global_batch_size` answers is made like this, for 2 prompts with 4 answers each:

    draw      2 prompts                    in the shuffled order of the epoch
    answer    8 answers                    random keys: training.seed and the number of the answer in the run
    reward    8 numbers per function       on the first process
    compare   8 advantages                 within each group of 4
    pack      3 rows of data.max_length    filled up to 4, where 4 devices share them

With `num_iterations` above 1 the same batch is returned so many times. Position and kept batch are JSON, so that a run resumes
at any update as if it had not stopped.

With `mesh.rollout_devices` the answers of an update are generated while the one before is computed, with the parameters before
that one:

    devices that train       update 1             update 2             update 3
    devices that generate    answers for 2        answers for 3        answers for 4
    with the parameters      of the start         after update 1       after update 2

The loop starts an update and asks for the next batch without waiting. The parameters are sent when a batch is handed out,
before the update that will take over their arrays is started. A checkpoint after update 1 has the answers for update 2, which
are generated before it is written.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from ftjax.config import Config
from ftjax.data.batch import Batch
from ftjax.data.shown import render, show_unit
from ftjax.errors import UserError
from ftjax.objectives import encoding_of
from ftjax.rl.advantages import Advantages, grpo_advantages, rloo_advantages
from ftjax.rl.apart import Sent
from ftjax.rl.batch import Answered, laid_out, smallest
from ftjax.rl.clock import Clock
from ftjax.rl.environment import Environments
from ftjax.rl.metrics import answer_metrics, dialogue_metrics, examples, reward_metrics, totals, weighted_means
from ftjax.rl.own import OwnReward, logged_beside
from ftjax.rl.prompts import Draw, Prompts
from ftjax.rl.rewards import Reward, shared_rewards
from ftjax.rl.rollout import Rollout
from ftjax.rl.sampler import Sampler
from ftjax.train.record import split_record
from ftjax.train.setup import Setup


def trained(one: Rollout, masks_truncated: bool) -> bool | list[bool]:
    """Return which tokens of an answer are trained: those that the model generated, unless it is cut off and left out."""
    if masks_truncated and one.truncated:
        return False
    return True if one.own is None else list(one.own)


class Prepared(NamedTuple):
    """Answers for an update, and what is logged of them; see `BatchSource`."""

    answers: list[Answered]
    metrics: Mapping[str, tuple[float, float]]
    texts: Sequence[Mapping[str, str]]
    trouble: str | None

    def state(self) -> list[Any]:
        """Return it as JSON, exact to the bit."""
        return [[answer.state() for answer in self.answers], *self[1:]]

    @classmethod
    def of(cls, state: Sequence[Any]) -> "Prepared":
        """Return what `state` described."""
        answers, metrics, texts, trouble = state
        pairs = {name: tuple(pair) for name, pair in metrics.items()}
        return cls([Answered.of(one) for one in answers], pairs, texts, trouble)


class RolloutBatches:
    """A `BatchSource` of answers to prompts."""

    def __init__(
        self, setup: Setup, prompts: Prompts, sampler: Sampler, rewards: Sequence[Reward],
        environments: Environments | None = None,
    ):  # fmt: skip
        self._environments = environments
        self._setup, self._prompts, self._sampler, self._rewards = setup, prompts, sampler, rewards
        self._config, self._section = setup.config, setup.config.objective
        options = setup.config.training
        self._groups = options.global_batch_size // self._section.num_generations
        epoch = len(prompts) / self._groups * self._section.num_iterations
        self.steps: int | None = options.max_steps or max(1, math.ceil(epoch * options.num_train_epochs))
        self.steps_per_epoch: int | None = math.ceil(epoch)
        self._draw, self._done = Draw(prompts.split, options.seed), 0  # updates
        self.follows = sampler.apart is None
        self._sent: Sent | None = None  # the parameters that the next answers are generated with, if on other devices
        self._ahead: Prepared | None = None  # the next answers, if a checkpoint has needed them already
        self._failed: UserError | None = None  # why there are none
        self._kept: list[Answered] | None = None  # the batch, while it is used again
        self._repeats = 0  # how often the kept batch has been returned
        self.metrics: Mapping[str, tuple[float, float]] = {}
        self.texts: Sequence[Mapping[str, str]] = ()
        self.trouble: str | None = None
        self.layout = smallest(setup)

    # ---- batches ----

    def next(self, params: Mapping[str, jax.Array]) -> Batch:
        """Generate answers with these parameters (on other devices: with those before), or return the latest ones once more."""
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error
        if self._kept is None:
            found = self._ahead or self._prepared(params if self._sent is None else self._sent)
            self._ahead, self._repeats = None, 0
            self._kept, self.metrics, self.texts, self.trouble = found
        else:
            self.metrics, self.texts, self.trouble = {}, (), None
        answers, self._repeats, self._done = self._kept, self._repeats + 1, self._done + 1
        if self._repeats == self._section.num_iterations:
            self._kept = None
        if self._sampler.apart is not None:
            self._sent = self._sampler.apart.send(params)
        return self._rows(answers)

    def _prepared(self, params: Mapping[str, jax.Array]) -> Prepared:
        """Generate answers with these parameters; if that fails, the position stays."""
        self.metrics, self.texts, self.trouble = {}, (), None
        before = self._draw.state()
        try:
            answers = self._generated(params)
        except UserError:
            self._draw.load(before)
            raise
        return Prepared(answers, self.metrics, self.texts, self.trouble)

    def _prepare_ahead(self) -> None:
        """Generate the answers that the next update needs, if they depend on parameters that a checkpoint does not have."""
        if self._sent is None or self._ahead is not None or self._done == self.steps:
            return
        shown = self.metrics, self.texts, self.trouble
        try:
            self._ahead = self._prepared(self._sent)
        except UserError as error:  # of the next update, which will raise it
            self._failed = error
        self.metrics, self.texts, self.trouble = shown

    def _rows(self, answers: Sequence[Answered]) -> Batch:
        self.layout, batch = laid_out(answers, self._setup, self._config.training.gradient_accumulation_steps)
        return batch

    def _generated(self, params: Mapping[str, jax.Array]) -> list[Answered]:
        """Return answers to the next prompts, with their advantages."""
        section, clock = self._section, Clock()
        rollouts, values, extra, logged = self._rewarded(params, clock)
        old = reference = None
        if not section.on_policy or (section.name == "rloo" and section.beta):
            with clock.of("rollout"):
                old = self._sampler.logprobs(params, rollouts)
                reference = self._sampler.reference_logprobs(rollouts) if section.name == "rloo" and section.beta else None
        advantages, metrics = self._compared(rollouts, values, old, reference)
        metrics |= answer_metrics(rollouts) | reward_metrics(self._rewards, values, advantages) | logged
        self.metrics = {**self.metrics, **totals(metrics | clock.spent)}
        self.texts = examples(self._rewards, rollouts, values, advantages, section.logged_completions, extra)
        return [
            Answered(
                [int(token) for token in one.prompt_ids], [int(token) for token in one.tokens], float(advantage),
                list(one.logprobs if old is None else old[number]), list(one.logprobs),
                trained(one, section.mask_truncated_completions),
            )
            for number, (one, advantage) in enumerate(zip(rollouts, advantages.values, strict=True))
        ]  # fmt: skip

    def _compared(
        self,
        rollouts: Sequence[Rollout],
        values: Float32[np.ndarray, "N F"],
        old: list[list[float]] | None,
        reference: list[list[float]] | None,
    ) -> tuple[Advantages, dict[str, float]]:
        """Return the advantages, and the KL divergence from the reference where it is a part of the rewards."""
        if self._section.name == "grpo":
            return grpo_advantages(self._section, values), {}
        if reference is None:
            return rloo_advantages(self._section, values), {}
        own = [one.own or [True] * len(one.tokens) for one in rollouts]
        kl = np.array([np.subtract(*pair)[mask].sum() for *pair, mask in zip(old, reference, own, strict=True)], np.float32)
        return rloo_advantages(self._section, values, kl), {"kl": float(kl.mean())}

    def _rewarded(
        self, params: Mapping[str, jax.Array], clock: Clock
    ) -> tuple[list[Rollout], Float32[np.ndarray, "N F"], list[dict[str, object]], dict[str, float]]:
        """Return answers in groups, their rewards, what reward functions have logged of each, and metrics of all that were
        drawn; with dynamic sampling, groups whose rewards differ as far as possible."""
        section = self._section
        size, again = section.num_generations, section.name == "grpo" and section.dynamic_sampling
        kept: list[tuple[list[Rollout], np.ndarray, list[dict[str, object]]]] = []
        alike: list[tuple[list[Rollout], np.ndarray, list[dict[str, object]]]] = []
        logged: list[tuple[int, Mapping[str, float]]] = []
        for _ in range(1 + (section.max_redraws if again else 0)):
            missing = self._groups - len(kept)
            first = self._draw.drawn * size
            questions = [self._prompts.questions[place] for place in self._draw.take(missing)]
            with clock.of("rollout"):
                rollouts = self._sampler.answer(params, questions, first)
            with clock.of("reward"):
                values = shared_rewards(self._rewards, rollouts, section.reward_timeout, self._done + 1)
            extra = logged_beside((reward.function for reward in self._rewards), len(rollouts))
            logged.append((missing, self._logged()))
            same = grpo_advantages(section, values).alike if again else np.zeros(missing, bool)
            for number, useless in enumerate(same):
                here = slice(number * size, (number + 1) * size)
                (alike if useless else kept).append((rollouts[here], values[here], extra[here]))
            if len(kept) == self._groups:
                break
        if again:
            self.metrics = {"rollout/redrawn_groups": (float(len(alike)), 1.0)}
        if left := self._groups - len(kept):
            self.trouble = (
                f"dynamic_sampling: after {section.max_redraws} redraws (objective.max_redraws) {left} of {self._groups} "
                "prompts still have answers that are all rewarded alike; they are in the batch and teach nothing. Of the "
                f"prompts that were drawn, {len(alike)} are too easy or too hard for the model"
            )
            kept += alike[:left]
        rollouts, values, extra = zip(*kept, strict=True)
        rollouts, extra = ([one for group in groups for one in group] for groups in (rollouts, extra))
        return rollouts, np.concatenate(values), extra, weighted_means(logged)

    def _logged(self) -> dict[str, float]:
        """Return what environments and own reward functions have logged of the latest answers."""
        found = {} if self._environments is None else dialogue_metrics(self._environments, self._sampler.turns)
        for reward in self._rewards:
            if isinstance(reward.function, OwnReward):
                found |= reward.function.metrics
        return found

    # ---- position ----

    def get_state(self) -> dict[str, Any]:
        """Return the position, the batch that is used again, and answers that are there already."""
        self._prepare_ahead()
        kept = None if self._kept is None else [answer.state() for answer in self._kept]
        return {
            "draw": self._draw.state(), "updates": self._done, "repeats": self._repeats if kept else 0, "kept": kept,
            "rows": self._prompts.facts, "ahead": None if self._ahead is None else self._ahead.state(),
        }  # fmt: skip

    def set_state(self, state: dict[str, Any]) -> None:
        """Move to a position. Raises UserError if columns of the rows have changed."""
        if state["rows"] != self._prompts.facts and not self._config.training.allow_changed_data:
            raise UserError(
                f"{self._prompts.split.report.source}: columns of the rows, which rewards may read, have changed since the "
                "checkpoint. Put them back, choose another output_dir, or set training.allow_changed_data: true"
            )
        self._draw.load(state["draw"])
        self._done, self._repeats = state["updates"], state["repeats"]
        self._kept = None if state["kept"] is None else [Answered.of(one) for one in state["kept"]]
        ahead = state.get("ahead")  # earlier versions wrote none
        self._sent, self._failed, self._ahead = None, None, None if ahead is None else Prepared.of(ahead)

    # ---- for people ----

    def report(self) -> list[str]:
        """Describe prompts and rewards."""
        section = self._section
        names = [f"{one.name} x {spec.weight:g}" for one, spec in zip(self._rewards, section.rewards, strict=True)]
        return [
            *self._prompts.split.report.lines(),
            f"an update: {self._groups} prompts with {section.num_generations} answers each, of up to "
            f"{section.max_completion_length} tokens; rewards: {', '.join(names)}",
            *([] if self._sampler.apart is None else [self._sampler.apart.line()]),
        ]

    def example(self, config: Config, tokenizer: Any) -> list[str]:
        """Show the first prompt."""
        [(unit, _)] = self._prompts.split.first(1)
        return ["a prompt:", *(render(item) for item in show_unit(unit, tokenizer, encoding_of(config)))]

    def record(self) -> dict[str, Any]:
        """Return `split_record` of the prompts."""
        return split_record(self._prompts.split)
