"""Answers as batches: prompts with answers, packed into rows, each trained token with its values.

The prompt `5 6` with the answer `7 2`, of advantage 0.5 and log-probabilities -1 and -2 for trainer and sampler alike:

    tokens    5  6    7    2
    targets   6  7    2    0
    weights   0  1    1    0
    labels    0 .5   .5    0     advantage; the log-probabilities stand beside it
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.data.batch import Batch, batch_arrays
from ftjax.data.pack import Plan, pack
from ftjax.data.rollout import VALUES
from ftjax.generate.cache import bucket


@dataclass(frozen=True)
class Answered:
    """A prompt with an answer, ready to be trained.

    Attributes:
        logprobs: of each token of the answer, before the first update with it.
        sampler: the same for the sampler.
        trained: whether its tokens count; if not, it counts as an answer all the same.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    advantage: float
    logprobs: Sequence[float]
    sampler: Sequence[float]
    trained: bool = True

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    def state(self) -> list[Any]:
        """Return it as JSON, exact to the bit."""
        return [list(self.prompt), list(self.answer), self.advantage, list(self.logprobs), list(self.sampler), self.trained]

    @classmethod
    def of(cls, state: Sequence[Any]) -> "Answered":
        """Return what `state` described."""
        return cls(*state)


def arranged(answers: Sequence[Answered], max_length: int, packing: bool, multiple: int) -> tuple[Plan, int]:
    """Return which answers stand in each row, and the number of rows, filled up to one of a few multiples of `multiple`."""
    lengths = np.array([len(answer) for answer in answers])
    plan = pack(lengths, max_length, None) if packing else Plan(np.arange(len(answers)), np.arange(len(answers) + 1))
    return plan, multiple * bucket(math.ceil(len(plan) / multiple))


def width_of(answers: Sequence[Answered], max_length: int, packing: bool, multiple: int) -> int:
    """Return the tokens of a row: `max_length`, or without packing one of a few lengths that hold the longest answer."""
    if packing:
        return max_length
    longest = bucket(max(map(len, answers)), 16)
    return min(max_length, math.ceil(longest / multiple) * multiple)


def filled(answers: Sequence[Answered], plan: Plan, rows: Sequence[int], width: int) -> Batch:
    """Build rows of a plan as arrays `[len(rows), width]`; a number past the plan gives a row of padding."""
    arrays = batch_arrays(len(VALUES))
    batch = {name: np.zeros((len(rows), width, one.width), one.dtype) for name, one in arrays.items()}
    for row, number in enumerate(rows):
        at = 0
        inside = plan.documents[plan.starts[number] : plan.starts[number + 1]] if number < len(plan) else ()
        for segment, which in enumerate(inside, 1):
            one = answers[which]
            size, first = len(one), len(one.prompt)
            here, own = slice(at, at + size), slice(at + first - 1, at + size - 1)  # the token before predicts each
            tokens = np.array([*one.prompt, *one.answer], np.int32)
            batch["tokens"][row, here, 0], batch["positions"][row, here, 0] = tokens, np.arange(size)
            batch["segment_ids"][row, here, 0] = segment
            batch["targets"][row, at : at + size - 1, 0] = tokens[1:]
            batch["weights"][row, own, 0] = float(one.trained)
            values = (np.full(len(one.answer), one.advantage), one.logprobs, one.sampler)
            batch["labels"][row, own] = np.stack(values, axis=-1)
            at += size
    return {name: values.reshape(len(rows), -1) for name, values in batch.items()}
