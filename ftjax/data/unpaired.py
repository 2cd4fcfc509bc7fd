"""Answers that are wanted or not, one at a time: the documents of KTO.

Each has a label, 1 or -1, among its values. To estimate how far the model has moved from its reference on any answer (its KL
divergence), a row also has a second document with label 0: the same prompt with the answer to another prompt.

    {"prompt": "Hi", "completion": " there", "label": true}      <s> Hi _there </s>  <s> Hi _3.14 </s>
    {"prompt": "Pi?", "completion": " 3.14", "label": false}     <s> Pi? _3.14 </s>  <s> Pi? _there </s>
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from ftjax.config.data import DataConfig
from ftjax.data.encode import Encoder
from ftjax.data.encoder import Encoded, TextPlan, Unit
from ftjax.data.encoding import Numbered
from ftjax.data.example import Example
from ftjax.data.pairs import Pairs, answer_turn, prompt_digest, refuse_options, rooms
from ftjax.data.report import DataReport
from ftjax.data.truncate import truncate
from ftjax.errors import UserError

GROUP = 256  # rows among which answers are exchanged


class UnpairedEncoder(Encoder):
    """Encodes a row as its conversation with a label, and the same prompt with another answer if it has one."""

    def plan(self, example: Example) -> Sequence[TextPlan | Encoded]:
        """Plan the documents of an example; see `RowEncoder.plan`."""
        if not example.labelled:
            raise UserError(
                f"{example.where}: this objective needs to know whether an answer is wanted; expected columns prompt, "
                "completion and label (true or false; of another name: data.columns: {label: NAME}), or prompt, chosen and "
                "rejected"
            )
        halves = [example] if example.rejected is None else [example, example.rejected]
        return [plan for half in halves for plan in super(UnpairedEncoder, self).plan(half)]

    def encode(self, plan: TextPlan, encodings: list[Any]) -> Encoded:
        """Return the document of a text with its label."""
        label = (1.0 if plan.example.wanted else -1.0) if plan.example.labelled else 0.0
        self.notes["wanted"] += label > 0
        self.notes["unwanted"] += label < 0
        return replace(super().encode(plan, encodings), labels=np.array([label], np.float32))


@dataclass(frozen=True)
class Unpaired(Pairs):
    """Each row is a prompt with an answer and a label.

    Attributes:
        kl: add a document for the KL divergence to each row.
    """

    kl: bool = True

    @property
    def sequences(self) -> int:
        return 2 if self.kl else 1

    @property
    def values(self) -> int:
        return 1 + self.numbers

    def key(self) -> Any:
        return ["unpaired", self.kl]

    def encoder(self, tokenizer: Any, config: DataConfig) -> UnpairedEncoder:
        refuse_options(config)
        return UnpairedEncoder(tokenizer, last_turn_only=config.last_turn_only)

    def arrange(self, rows: Iterable[Numbered], report: DataReport) -> Iterator[Numbered]:
        """Make a pair a wanted and an unwanted answer, and give each row an answer to another prompt of its group."""
        single = (one for row in rows for one in _single(row, report))
        if not self.kl:
            yield from single
            return
        last: Example | None = None  # of the group before
        while group := list(islice(single, GROUP)):
            labelled = [example for _, _, example in group if example.labelled]
            others = iter(_others(labelled, last))
            for number, mark, example in group:
                yield number, mark, _with_other(example, next(others)) if example.labelled else example
            last = labelled[-1] if labelled else last

    def size(self, unit: Sequence[Encoded]) -> int:
        """Return the tokens of the row's own answer and its prompt."""
        return len(unit[0].tokens)

    def refused(self, unit: Sequence[Encoded]) -> str | None:
        return None

    def shorten(self, unit: Unit, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """Shorten the documents of a row to fit into one row of a batch.

        The answer may take half of it, and what the document for the KL divergence leaves. That document loses its end, so
        that no row is dropped because the answer to another is long.
        """
        if not self.kl:
            return truncate(unit[0], config.max_length, config.truncation, bos)
        own, other = unit
        room = rooms([len(own.tokens), len(other.tokens)], config.max_length)[0]
        if len(own.tokens) > room:
            if config.truncation == "error":
                raise UserError(
                    f"{own.where}: {len(own.tokens)} tokens are more than half of data.max_length {config.max_length}, and "
                    "the row must also hold a document for the KL divergence; raise it, or choose data.truncation: drop, "
                    "right, left or middle"
                )
            own = next(iter(truncate(own, room, config.truncation, bos)), None)
            if own is None:
                return ()
        left = config.max_length - len(own.tokens)
        return own, other if len(other.tokens) <= left else truncate(other, left, "right", bos)[0]

    def captions(self, unit: Unit) -> Sequence[str]:
        label = "wanted" if unit[0].labels[0] > 0 else "unwanted"
        return (label, "for the KL divergence") if self.kl else (label,)


def _single(row: Numbered, report: DataReport) -> Sequence[Numbered]:
    """Return a row with one answer as it is, and a pair as two rows of one digest."""
    number, mark, example = row
    if example.rejected is None:
        return [(2 * number, mark, example)]
    report.divided += 1
    halves = (replace(example, rejected=None), True), (example.rejected, False)
    return [
        (2 * number + (not wanted), mark, replace(half, wanted=wanted, labelled=True, margin=None)) for half, wanted in halves
    ]


def _others(examples: Sequence[Example], before: Example | None) -> list[Example]:
    """Return for each example the one whose answer it gets: to another prompt as far as there is one, each of them once.

    With the examples in order of their prompts, that is the one so many places before as the most frequent prompt has rows;
    if all prompts differ, the neighbour.

    Args:
        before: for an example alone.
    """
    if len(examples) < 2:
        return [example if before is None else before for example in examples]
    prompts = [prompt_digest(example) for example in examples]
    first = {prompt: number for number, prompt in reversed([*enumerate(prompts)])}
    order = sorted(range(len(examples)), key=lambda number: first[prompts[number]])
    most = max(Counter(prompts).values())
    shift = most if most < len(examples) else 1
    found = {number: examples[order[place - shift]] for place, number in enumerate(order)}
    return [found[number] for number in range(len(examples))]


def _with_other(example: Example, other: Example) -> Example:
    """Return an example whose second document has the answer of another."""
    answer = () if other.messages is None else other.messages[answer_turn(other) :]
    completion = other.completion
    if completion is None:
        completion = next((turn["content"] for turn in answer if isinstance(turn.get("content"), str)), "")
    if other.messages is None:
        answer = ({"role": "assistant", "content": completion},)
    messages = None if example.messages is None else (*example.messages[: answer_turn(example)], *answer)
    completion = None if example.prompt is None else completion
    return replace(example, rejected=replace(example, completion=completion, messages=messages, labelled=False))
