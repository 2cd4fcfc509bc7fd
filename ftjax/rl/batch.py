"""Answers as batches: documents packed into rows, each token with its values.

The prompt `5 6` with the answer `7 2`, of advantage 0.5 and log-probabilities -1 and -2 for trainer and sampler alike:

    tokens    5  6    7    2
    targets   6  7    2    0
    weights   0  1    1    0
    labels    0 .5   .5    0     advantage; the log-probabilities stand beside it

Answers to one prompt share it where model and attention allow: `5 6` with the answers `7 2` and `8 2` is one document,

    tokens    5  6  7  2  6  8  2      the last token of the prompt comes before each answer, because it predicts it
    positions 0  1  2  3  1  2  3
    segments  1  1  1  1  2  2  2
    ends      7  4  4  4  7  7  7      slot at which a token is no longer seen (`ftjax.models.nn.context.Branching`)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int32

from ftjax.config.rewards import Rollouts
from ftjax.data.align import Pair, lay_out
from ftjax.data.batch import Batch, BatchArray, batch_arrays
from ftjax.data.pack import Plan, pack
from ftjax.data.rollout import VALUES
from ftjax.generate.cache import bucket
from ftjax.mesh import parts
from ftjax.models.nn.attention import BRANCHING
from ftjax.objectives import encoding_of
from ftjax.train.layout import BatchLayout
from ftjax.train.setup import Setup


class Document(Protocol):
    """A text that is trained.

    Attributes:
        tokens: of all of it.
        weights: of each token as a target.
        values: of each token as a target (`RowEncoding.values`).
        pair: with a teacher of another tokenizer: the alignment, which comes first among the values; or None.
    """

    def __len__(self) -> int: ...
    @property
    def pair(self) -> Pair | None: ...
    @property
    def tokens(self) -> Int32[np.ndarray, " T"]: ...
    @property
    def weights(self) -> Float32[np.ndarray, " T"]: ...
    @property
    def values(self) -> Float32[np.ndarray, "T values"]: ...


@dataclass(frozen=True)
class Answered:
    """A prompt with an answer, ready to be trained.

    Attributes:
        logprobs: of each token of the answer, before the first update with it.
        sampler: the same for the sampler.
        trained: whether its tokens count, or which of them; if none do, it counts as an answer all the same.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    advantage: float
    logprobs: Sequence[float]
    sampler: Sequence[float]
    trained: bool | Sequence[bool] = True
    pair = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def tokens(self) -> Int32[np.ndarray, " T"]:
        return np.array([*self.prompt, *self.answer], np.int32)

    @property
    def weights(self) -> Float32[np.ndarray, " T"]:
        own = np.broadcast_to(np.array(self.trained, np.float32), len(self.answer))
        return np.concatenate([np.zeros(len(self.prompt), np.float32), own])

    @property
    def values(self) -> Float32[np.ndarray, "T values"]:
        """See `VALUES`; zeros for the prompt."""
        own = np.stack([np.full(len(self.answer), self.advantage), self.logprobs, self.sampler], axis=-1)
        return np.concatenate([np.zeros((len(self.prompt), len(VALUES))), own]).astype(np.float32)

    def state(self) -> list[Any]:
        """Return it as JSON, exact to the bit."""
        return [list(self.prompt), list(self.answer), self.advantage, list(self.logprobs), list(self.sampler), self.trained]

    @classmethod
    def of(cls, state: Sequence[Any]) -> "Answered":
        """Return what `state` described."""
        return cls(*state)


@dataclass(frozen=True)
class Together:
    """Answers to one prompt, which is there once. Its arrays are those of `Document`, answer after answer.

    Attributes:
        answers: at least one; each has the same prompt.
    """

    answers: Sequence[Answered]
    pair = None

    @property
    def shared(self) -> int:
        """The tokens that the answers share: all of the prompt but its last token."""
        return len(self.answers[0].prompt) - 1

    def __len__(self) -> int:
        return self.shared + sum(len(one) - self.shared for one in self.answers)

    def _joined(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Join an array of each answer: the shared part of the first, and what follows it of all."""
        return np.concatenate([arrays[0][: self.shared], *(one[self.shared :] for one in arrays)])

    @property
    def tokens(self) -> Int32[np.ndarray, " T"]:
        return self._joined([one.tokens for one in self.answers])

    @property
    def weights(self) -> Float32[np.ndarray, " T"]:
        return self._joined([one.weights for one in self.answers])

    @property
    def values(self) -> Float32[np.ndarray, "T values"]:
        return self._joined([one.values for one in self.answers])

    @property
    def positions(self) -> Int32[np.ndarray, " T"]:
        return self._joined([np.arange(len(one), dtype=np.int32) for one in self.answers])

    @property
    def segments(self) -> Int32[np.ndarray, " T"]:
        """The answer of each token, from 1; a shared token counts to the first."""
        return self._joined([np.full(len(one), number, np.int32) for number, one in enumerate(self.answers, 1)])

    @property
    def ends(self) -> Int32[np.ndarray, " T"]:
        """The place at which a token is no longer seen."""
        own = np.cumsum([len(one) - self.shared for one in self.answers]) + self.shared
        found = self._joined([np.full(len(one), end, np.int32) for one, end in zip(self.answers, own, strict=True)])
        found[: self.shared] = len(self)
        return found


def together(answers: Sequence[Answered], room: int) -> list[Together]:
    """Join neighbours with the same prompt as far as `room` tokens hold them, into equally many as far as possible."""
    found: list[Together] = []
    for _, group in groupby(answers, key=lambda one: tuple(one.prompt)):
        group = list(group)
        for count in range(1, len(group) + 1):
            cuts = [len(group) * part // count for part in range(count + 1)]
            made = [Together(group[a:b]) for a, b in pairwise(cuts)]
            if max(map(len, made)) <= room:
                break
        found += made
    return found


def shares_prompts(setup: Setup) -> bool:
    """Return whether answers to a prompt share it in the batches of a run."""
    config = setup.config
    return (
        isinstance(config.objective, Rollouts)
        and config.data.packing
        and setup.model.branches
        and setup.runtime.attention in BRANCHING
    )


def smallest(setup: Setup) -> BatchLayout:
    """Return the layout of the smallest update of a run: in each microbatch, one row for each device that shares them."""
    steps = setup.config.training.gradient_accumulation_steps
    return BatchLayout(setup.mesh, steps * parts(setup.mesh.shape, "batch"), steps)


def laid_out(answers: Sequence[Document], setup: Setup, microbatches: int | None) -> tuple[BatchLayout, Batch]:
    """Return the layout of a batch of these documents, and this process's rows of it.

    Args:
        microbatches: None for a batch without that axis, as in evaluation.
    """
    data, multiple = setup.config.data, parts(setup.mesh.shape, "batch") * (microbatches or 1)
    if shared := shares_prompts(setup):
        answers = together(answers, data.max_length)
    plan, rows = arranged(answers, data.max_length, data.packing, multiple)
    layout = BatchLayout(setup.mesh, rows, microbatches)
    width = width_of(answers, data.max_length, data.packing, layout.length_parts)
    return layout, filled(answers, plan, layout.own.tolist(), width, encoding_of(setup.config).values, shared)


def room_of(document: Document) -> int:
    """Return the tokens of a row that a document takes."""
    return len(document) if document.pair is None else max(len(document), len(document.pair.tokens))


def arranged(answers: Sequence[Document], max_length: int, packing: bool, multiple: int) -> tuple[Plan, int]:
    """Return which answers stand in each row, and the number of rows, filled up to one of a few multiples of `multiple`."""
    lengths = np.array(list(map(room_of, answers)))
    plan = pack(lengths, max_length, None) if packing else Plan(np.arange(len(answers)), np.arange(len(answers) + 1))
    return plan, multiple * bucket(math.ceil(len(plan) / multiple))


def width_of(answers: Sequence[Document], max_length: int, packing: bool, multiple: int) -> int:
    """Return the tokens of a row: `max_length`, or without packing one of a few lengths that hold the longest answer."""
    if packing:
        return max_length
    longest = bucket(max(map(room_of, answers)), 16)
    return min(max_length, math.ceil(longest / multiple) * multiple)


def filled(
    answers: Sequence[Document], plan: Plan, rows: Sequence[int], width: int, values: int, shared: bool = False
) -> Batch:
    """Build rows of a plan as arrays `[len(rows), width]`; a number past the plan gives a row of padding.

    Args:
        values: the number of values of a token.
        shared: whether the documents are `Together`; the batch then has `ends`, too.
    """
    arrays = batch_arrays(values) | ({"ends": BatchArray(np.int32)} if shared else {})
    batch = {name: np.zeros((len(rows), width, one.width), one.dtype) for name, one in arrays.items()}
    for row, number in enumerate(rows):
        at = beside = before = 0
        inside = plan.documents[plan.starts[number] : plan.starts[number + 1]] if number < len(plan) else ()
        for which in inside:
            one = answers[which]
            size, tokens = len(one), one.tokens
            here, early = slice(at, at + size), slice(at, at + size - 1)  # the token before predicts each
            batch["tokens"][row, here, 0] = tokens
            batch["positions"][row, here, 0] = one.positions if shared else np.arange(size)
            batch["segment_ids"][row, here, 0] = before + (one.segments if shared else 1)
            if shared:
                batch["ends"][row, here, 0] = at + one.ends
            batch["targets"][row, early, 0], batch["weights"][row, early, 0] = tokens[1:], one.weights[1:]
            if (own := one.values).shape[1]:
                batch["labels"][row, early, values - own.shape[1] :] = own[1:]
            if one.pair is not None:
                lay_out(batch["labels"][row], one.pair, at, beside, before + 1)
                beside += len(one.pair.tokens)
            at, before = at + size, before + (len(one.answers) if shared else 1)
    return {name: found.reshape(len(rows), -1) for name, found in batch.items()}
