"""Batches of distillation with answers that the student itself generates (GKD, Agarwal et al. 2024, arXiv:2306.13649).

A batch of `training.global_batch_size` documents, drawn in the shuffled order of the epoch. With `lmbda: 0.5` every second one
is answered by the student, with the parameters of the moment:

    the data's     Q: 2+2= A: 4 </s>        trained on `4 </s>`, value 1
    the student's  Q: 2+3= A: 6 </s>        trained on `6 </s>`, value 0: the teacher judges it, and nobody imitates it

The prompt of a conversation is what comes before its last answer. They are packed into rows, as answers of `grpo` are. Random
keys follow from `training.seed` and the number of the document in the run, so that a run resumes as if it had not stopped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32

from ftjax.config import Config
from ftjax.data.align import VALUES, Pair
from ftjax.data.batch import Batch
from ftjax.data.encoder import Encoded
from ftjax.data.pipeline import PackedSplit
from ftjax.errors import UserError
from ftjax.generate.answer import Generation
from ftjax.objectives import encoding_of
from ftjax.rl.batch import laid_out, smallest
from ftjax.rl.clock import Clock
from ftjax.rl.metrics import LONGEST, answer_metrics, totals
from ftjax.rl.prompts import Draw
from ftjax.rl.sampler import Sampler
from ftjax.train.announce import example_lines
from ftjax.train.means import Means
from ftjax.train.observer import Observation, Observer
from ftjax.train.record import split_record
from ftjax.train.setup import Setup
from ftjax.train.step import make_eval_step


@dataclass(frozen=True)
class Lesson:
    """A document with an answer of the data or of the student.

    Attributes:
        tokens, weights: see `ftjax.rl.batch.Document`.
        own: whether the answer is the data's.
        kinds: the number of values of a token besides those of the alignment, 1 or 0.
        pair: see there.
    """

    tokens: Int32[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"]
    own: bool
    kinds: int
    pair: Pair | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def values(self) -> Float32[np.ndarray, "T values"]:
        return np.full((len(self), self.kinds), self.own, np.float32)


def prompt_of(document: Encoded) -> list[int]:
    """Return the tokens before the last answer of a document, and all of a document without one."""
    trained = np.flatnonzero(document.weights)
    if not len(trained):
        return document.tokens.tolist()
    before = np.flatnonzero(document.weights[: trained[-1]] == 0)
    return document.tokens[: before[-1] + 1 if len(before) else 0].tolist()


def of_student(split: PackedSplit, place: int, prompt: Sequence[int], answer: Generation, kinds: int) -> Lesson:
    """Return the document of a generated answer. Args: place: of the document whose prompt it answers."""
    tokens, partners, pair = np.array([*prompt, *answer.tokens], np.int32), split.partners, None
    weights = np.repeat(np.array([0, 1], np.float32), [len(prompt), len(answer.tokens)])
    if partners is not None:
        asked = prompt_of(partners.other.document(partners.numbers[place]))
        pair = partners.answered(prompt, answer.tokens, not answer.truncated, asked, split.max_length)
    return Lesson(tokens, weights, False, kinds, pair)


def kinds_of(setup: Setup, split: PackedSplit) -> int:
    """Return the number of values of a token besides those of an alignment."""
    return encoding_of(setup.config).values - (0 if split.partners is None else len(VALUES))


def refuse_without_prompt(split: PackedSplit, bos: int | None) -> None:
    """Raise UserError, with file and line, for a document that is an answer from its first token on."""
    documents = split.documents
    starts = documents.starts[split.chosen]
    begins = documents.weights[starts] > 0
    second = np.minimum(starts + 1, documents.starts[split.chosen + 1] - 1)
    begins |= (documents.weights[second] > 0) & (documents.tokens[starts] == (-1 if bos is None else bos))
    for place in split.chosen[begins].tolist():
        document = documents.document(place)
        if len(prompt_of(document)) <= 1:
            raise UserError(
                f"{document.where}: there is no prompt that the student could answer, and with objective.lmbda above 0 it "
                "answers some; expected columns prompt and completion, or messages. For texts set objective.lmbda: 0"
            )


class LessonBatches:
    """A `BatchSource` of documents, some of them answered by the student."""

    follows = True

    def __init__(self, setup: Setup, split: PackedSplit, sampler: Sampler, tokenizer: Any):
        self._setup, self._split, self._sampler, self._tokenizer = setup, split, sampler, tokenizer
        self._section, options = setup.config.objective, setup.config.training
        refuse_without_prompt(split, tokenizer.bos_token_id)
        self._size, self._kinds = options.global_batch_size, kinds_of(setup, split)
        epoch = len(split.plan(0, True, options.seed).documents) / self._size
        self.steps: int | None = options.max_steps or max(1, math.ceil(epoch * options.num_train_epochs))
        self.steps_per_epoch: int | None = math.ceil(epoch)
        self._draw = Draw(split, options.seed)
        self.metrics: Mapping[str, tuple[float, float]] = {}
        self.texts: Sequence[Mapping[str, str]] = ()
        self.trouble: str | None = None
        self.layout = smallest(setup)

    def next(self, params: Mapping[str, jax.Array]) -> Batch:
        """Draw documents, and answer the student's share of them with these parameters."""
        before = self._draw.state()
        try:
            return self._batch(params)
        except UserError:
            self._draw.load(before)
            raise

    def _batch(self, params: Mapping[str, jax.Array]) -> Batch:
        first, clock = self._draw.drawn, Clock()
        places, partners = self._draw.take(self._size), self._split.partners
        drawn = [self._split.documents.document(place) for place in places]
        asked = [number for number in range(len(drawn)) if self._generated(first + number)]
        prompts = [prompt_of(drawn[number]) for number in asked]
        with clock.of("rollout"):
            numbers = [first + number for number in asked]
            limits = [self._split.max_length - len(prompt) for prompt in prompts]
            answers = self._sampler.generate(params, prompts, numbers, limits) if asked else []
        lessons = [
            Lesson(one.tokens, one.weights, True, self._kinds, None if partners is None else partners.pair(place))
            for place, one in zip(places, drawn, strict=True)
        ]
        for number, prompt, answer in zip(asked, prompts, answers, strict=True):
            lessons[number] = of_student(self._split, places[number], prompt, answer, self._kinds)
        self.metrics = totals(answer_metrics(answers) | clock.spent) if answers else {}
        self.texts = [
            {"prompt": self._tokenizer.decode(prompt)[-LONGEST:], "text": answer.text[:LONGEST]}
            for prompt, answer in list(zip(prompts, answers, strict=True))[: self._section.logged_completions]
        ]
        self.layout, batch = laid_out(lessons, self._setup, self._setup.config.training.gradient_accumulation_steps)
        return batch

    def _generated(self, number: int) -> bool:
        """Return whether the student answers the document of this number in the run: evenly spread, `lmbda` of all."""
        share = self._section.lmbda
        return math.floor((number + 1) * share) > math.floor(number * share)

    def get_state(self) -> dict[str, Any]:
        """Return the position."""
        return self._draw.state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Move to a position."""
        self._draw.load(state)

    def report(self) -> list[str]:
        """Describe the data."""
        share = self._section.lmbda
        return [
            *self._split.report.lines(),
            f"an update: {self._size} documents; {share:.0%} of them are answered by the model in training, with up to "
            f"{self._section.max_completion_length} tokens",
        ]

    def example(self, config: Config, tokenizer: Any) -> list[str]:
        """Show the first document."""
        return example_lines(config, self._split, tokenizer)

    def record(self) -> dict[str, Any]:
        """Return `split_record` of the data."""
        return split_record(self._split)


class LessonObserver:
    """Answers the validation prompts, with the sampling of training, and measures how far the student is from the teacher
    there; for data that has prompts alone."""

    def __init__(self, setup: Setup, split: PackedSplit, sampler: Sampler, other: Observer | None):
        """Args: other: is called, too."""
        self._setup, self._split, self._sampler, self._other = setup, split, sampler, other
        self._step = jax.jit(make_eval_step(setup.loss_fn, replace(setup.runtime, remat="none")))

    @property
    def facts(self) -> dict[str, Any]:
        """What must be equal on all processes of a run."""
        return {} if self._other is None else self._other.facts

    def __call__(self, params: Mapping[str, jax.Array]) -> Observation:
        """Evaluate the model. Args: params: all parameters, trained and frozen."""
        other = self._other(params) if self._other is not None else Observation({}, [])
        means, answers, size = Means(), [], self._setup.config.training.global_batch_size
        for start in range(0, len(self._split.chosen), size):
            places = self._split.chosen[start : start + size].tolist()
            prompts = [prompt_of(self._split.documents.document(place)) for place in places]
            limits = [self._split.max_length - len(prompt) for prompt in prompts]
            found = self._sampler.generate(params, prompts, range(start, start + len(places)), limits)
            lessons = [of_student(self._split, *one, 0) for one in zip(places, prompts, found, strict=True)]
            layout, batch = laid_out(lessons, self._setup, None)
            totals = self._step(*self._setup.divided(params), layout.arrays(batch))
            means.add(jax.tree.map(float, {"loss": (totals.loss, totals.weight), **totals.metrics}))
            answers += found
        metrics = {**means.means(), **answer_metrics(answers)}
        return Observation({**other.metrics, **{f"eval/{name}": value for name, value in metrics.items()}}, other.texts)
