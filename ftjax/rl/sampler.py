"""Generates answers with the parameters in training, and computes their log-probabilities.

With `mesh.rollout_devices` it generates on devices of its own, to which the caller sends the parameters: those in training are
then on their way while it works with earlier ones. Several processes then answer a share of the prompts each.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from ftjax.generate.answer import Generation
from ftjax.generate.request import Request
from ftjax.generate.sample import Sampling
from ftjax.generate.session import Generator
from ftjax.rl.apart import RolloutDevices, Sent
from ftjax.rl.dialogue import Dialogues
from ftjax.rl.environment import Environments
from ftjax.rl.prompts import Question
from ftjax.rl.rollout import Rollout
from ftjax.rl.share import in_shares
from ftjax.train.setup import Setup

ANOTHER_SEED = 1_000_003


class Sampler:
    """The model of a run, as a sampler. It holds no trained parameters of its own: each call gets those of the moment.

    Attributes:
        apart: the devices that only generate; None if those that train do.
    """

    def __init__(self, setup: Setup, tokenizer: Any, environments: Environments | None = None):
        """Args: environments: with which answers are dialogues."""
        self._setup, self.section = setup, setup.config.objective
        how: dict[str, Any] = {"mesh": setup.mesh, "dtype": setup.runtime.dtype, "source": setup.source}
        self.apart = RolloutDevices(setup) if setup.rollout_devices else None
        own = how if self.apart is None else {**how, "mesh": self.apart.mesh}
        self._generator = Generator.of(setup.model, {}, tokenizer, of_sampler=True, **own)
        self._reference = None
        if setup.reference is not None:
            self._reference = Generator.of(setup.reference.model, {}, tokenizer, **how)
        self._rows = self.section.generation_batch_rows
        self._dialogues = None
        if environments is not None:
            self._dialogues = Dialogues(
                environments, tokenizer, max_length=setup.config.data.max_length,
                max_completion_length=self.section.max_completion_length, replies=self.section.max_tool_calling_iterations,
            )  # fmt: skip

    @property
    def turns(self) -> Sequence[int]:
        """Answers of the model in each of the latest dialogues; none if answers are not dialogues."""
        return () if self._dialogues is None else self._dialogues.turns

    @property
    def ends(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self._generator.ends

    def answer(
        self, params: Mapping[str, jax.Array], questions: Sequence[Question], first: int, *, count: int | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """Generate the answers to each prompt, one prompt after the other.

        Args:
            params: the trained parameters.
            first: number of the first answer of the run among all, which determines its random key.
            count: answers to each prompt; None for those of the configuration.
        """
        asked = [question for question in questions for _ in range(count or self.section.num_generations)]
        numbers = range(first, first + len(asked))
        if self._dialogues is not None:
            return self._dialogues.hold(
                asked,
                lambda prompts, which, turn, limits: self.generate(
                    params, prompts, [numbers[one] for one in which], limits, turn=turn
                ),
            )
        found = self.generate(params, [question.ids.tolist() for question in asked], numbers)
        return [
            Rollout(question.item, question.prompt, question.ids.tolist(), one.text, one.tokens, one.logprobs, one.truncated)
            for question, one in zip(asked, found, strict=True)
        ]

    def generate(
        self, params: Mapping[str, jax.Array], prompts: Sequence[Sequence[int]], numbers: Sequence[int],
        limits: Sequence[int] | None = None, *, turn: int = 0,
    ) -> list[Generation]:  # fmt: skip
        """Generate one answer to each prompt; all processes call it.

        Args:
            params: the trained parameters, or all that were sent to the devices that generate.
            prompts: token ids.
            numbers: of each answer among all of the run, which determine their random keys with `turn`.
            limits: the most tokens of each answer, below that of the configuration.
            turn: how many answers of the same dialogue came before.
        """
        section, seed = self.section, self._setup.config.training.seed + turn * ANOTHER_SEED
        sampling = Sampling(
            temperature=section.temperature, top_k=section.top_k or None, top_p=section.top_p if section.top_p < 1 else None,
            min_p=section.min_p or None, repetition_penalty=section.repetition_penalty,
        )  # fmt: skip
        most = section.max_completion_length
        requests = [
            Request(list(ids), sampling, min(most, limit), seed=seed, number=number)
            for ids, number, limit in zip(prompts, numbers, [most] * len(prompts) if limits is None else limits, strict=True)
        ]
        with self._with(self._generator, self._placed(params)) as generator:
            if self.apart is None:
                return generator.answer(requests, batch_size=self._rows, logprobs=True)
            rows = math.ceil(self._rows / self.apart.processes)
            return in_shares(requests, lambda own: generator.answer(own, batch_size=rows, logprobs=True))

    def _placed(self, params: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """Return all parameters where answers are generated."""
        if self.apart is None:
            return {**self._setup.frozen, **params}
        return params if isinstance(params, Sent) else self.apart.send(params)

    def logprobs(self, params: Mapping[str, jax.Array], rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Return the log-probability of each token of each answer for the trainer's own program."""
        return self._scores(self._generator, {**self._setup.frozen, **params}, rollouts)

    def reference_logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Return the same for the reference model."""
        return self._scores(self._reference, self._setup.reference.params(self._setup.frozen), rollouts)

    def _scores(self, generator: Generator, params: Mapping[str, jax.Array], rollouts: Sequence[Rollout]) -> list[list[float]]:
        prompts, answers = [list(one.prompt_ids) for one in rollouts], [list(one.tokens) for one in rollouts]
        with self._with(generator, params) as scorer:
            found = scorer.score(prompts, answers, batch_size=self._rows, temperature=self.section.temperature)
        return [one.logprobs for one in found]

    @contextmanager
    def _with(self, generator: Generator, params: Mapping[str, jax.Array]):
        generator.params = dict(params)
        try:
            yield generator
        finally:
            generator.params = {}  # the next update donates these arrays
