"""Pairs of answers to one prompt: the documents of preference training.

A row becomes two documents that stay together in one row of a batch, the chosen one first; only the answers have weight:

    {"prompt": "Hi", "chosen": " there", "rejected": " you"}

    tokens       1 15 31  2  1 15 44  2        <s> Hi _there </s>  <s> Hi _you </s>
    weights      0  0  1  1  0  0  1  1
    segment_ids  1  1  1  1  2  2  2  2
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftjax.config.data import DataConfig
from ftjax.data.clean import content, digest
from ftjax.data.encode import Encoder
from ftjax.data.encoder import Encoded, TextPlan, Unit
from ftjax.data.encoding import Numbered, RowEncoding
from ftjax.data.example import Example
from ftjax.data.report import DataReport
from ftjax.data.truncate import truncate
from ftjax.errors import UserError

EQUAL = "with equal chosen and rejected answers"
ALONE = "unpaired, without an answer of the other kind to the same prompt"


class PairEncoder(Encoder):
    """Encodes a row as two conversations (or texts) that share the prompt."""

    def plan(self, example: Example) -> Sequence[TextPlan | Encoded]:
        """Plan the chosen and the rejected document of an example; see `RowEncoder.plan`."""
        if example.rejected is None:
            raise UserError(
                f"{example.where}: this objective compares two answers; expected columns prompt, chosen and rejected (or "
                "prompt, completion and label, with answers of both kinds to each prompt)"
            )
        return [plan for half in (example, example.rejected) for plan in super(PairEncoder, self).plan(half)]


@dataclass(frozen=True)
class Pairs(RowEncoding):
    """Each row is a prompt with a chosen and a rejected answer.

    Attributes:
        numbers: numbers per document that the objective computes before training (`ftjax.train.precompute`).
    """

    numbers: int = 0

    sequences = 2
    unwanted = rejected = True
    formats = ("preference", "unpaired_preference", "unpaired_messages")

    @property
    def values(self) -> int:
        return self.numbers

    def key(self) -> Any:
        return "pairs"

    def encoder(self, tokenizer: Any, config: DataConfig) -> PairEncoder:
        refuse_options(config)
        return PairEncoder(tokenizer, last_turn_only=config.last_turn_only)

    def arrange(self, rows: Iterable[Numbered], report: DataReport) -> Iterator[Numbered]:
        """Pair unpaired answers of both kinds to the same prompt, in their order; those that remain alone are counted."""
        waiting: dict[int, deque[Numbered]] = {}
        for row in rows:
            example = row[2]
            if not example.labelled:
                yield row
                continue
            others = waiting.setdefault(prompt_digest(example), deque())
            if others and others[0][2].wanted != example.wanted:
                first = others.popleft()
                good, bad = (first, row) if first[2].wanted else (row, first)
                pair = replace(good[2], rejected=bad[2], labelled=False)
                report.joined += 1
                yield first[0], digest(content(pair)), pair
            else:
                others.append(row)
        if alone := sum(map(len, waiting.values())):
            report.dropped[ALONE] += alone

    def refused(self, unit: Sequence[Encoded]) -> str | None:
        return EQUAL if np.array_equal(unit[0].tokens, unit[1].tokens) else None

    def shorten(self, unit: Unit, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """Shorten the documents as `shorten_pair` does. Raises UserError where `data.truncation` is `error`."""
        refuse_long(unit, config)
        return shorten_pair(unit, config.max_length, config.truncation, bos)

    def captions(self, unit: Unit) -> Sequence[str]:
        return "chosen", "rejected"


def refuse_long(unit: Unit, config: DataConfig) -> None:
    """Raise UserError for a pair that is too long, where `data.truncation` is `error`."""
    if config.truncation == "error":
        total = sum(len(document.tokens) for document in unit)
        raise UserError(
            f"{unit[0].where}: the chosen and the rejected conversation have {total} tokens together, more than "
            f"data.max_length {config.max_length}, and must fit into one row; raise it, or choose data.truncation: drop, "
            "right, left or middle"
        )


def shorten_pair(unit: Unit, capacity: int, policy: str, bos: int | None) -> Sequence[Encoded]:
    """Shorten the longer of two documents that have more than `capacity` tokens together, or both to a half of it.

    `[5, 3]` tokens become `[3, 3]` for a capacity of 6, and `[5, 4]` too; `drop` returns none.
    """
    found: list[Encoded] = []
    for document, room in zip(unit, rooms([len(document.tokens) for document in unit], capacity), strict=True):
        found += [document] if len(document.tokens) <= room else truncate(document, room, policy, bos)
    return found if len(found) == len(unit) else ()


def rooms(lengths: Sequence[int], capacity: int) -> list[int]:
    """Divide `capacity` tokens between two documents: a half each, and what the shorter one leaves to the other."""
    half = capacity // 2
    return [max(half, capacity - other) for other in reversed(lengths)]


def refuse_options(config: DataConfig) -> None:
    """Raise UserError for an option that an objective that compares answers cannot follow."""
    if config.train_on_inputs:
        raise UserError("data.train_on_inputs: an objective that compares answers trains the answers alone; leave it out")
    if config.truncation == "split":
        raise UserError("data.truncation: split would give parts of answers to compare; choose drop, right, left or middle")


def prompt_digest(example: Example) -> int:
    """Return a hash of all that the model sees before the answer of an example with one answer."""
    turns = None if example.messages is None else example.messages[: answer_turn(example)]
    facts = [example.prompt, turns, example.tools, example.template_arguments]
    return digest(json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str))


def answer_turn(example: Example) -> int:
    """Return the number of the message with which the answer of a conversation begins."""
    if example.prompt_turns is not None:
        return example.prompt_turns
    trained = (n for n, m in enumerate(example.messages) if m["role"] == "assistant" and m.get("train", True))
    return next(trained, len(example.messages))
