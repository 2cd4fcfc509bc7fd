"""Answers that are wanted or not, one at a time: the documents of KTO.

Each has a label, 1 or -1, among its values. To estimate how far the model has moved from its reference on any answer (its KL
divergence), a row also has a second document with label 0: the same prompt with the answer of another row.

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
from ftjax.data.clean import digest
from ftjax.data.encode import Encoder
from ftjax.data.encoder import Encoded, TextPlan, Unit
from ftjax.data.encoding import Numbered
from ftjax.data.example import Example
from ftjax.data.pairs import Pairs, refuse_trained_prompts
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
                "completion and label (true or false), or prompt, chosen and rejected"
            )
        halves = [example] if example.rejected is None else [example, example.rejected]
        return [plan for half in halves for plan in super(UnpairedEncoder, self).plan(half)]

    def encode(self, plan: TextPlan, encodings: list[Any]) -> Encoded:
        """Return the document of a text with its label."""
        label = (1.0 if plan.example.wanted else -1.0) if plan.example.labelled else 0.0
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
        refuse_trained_prompts(config)
        return UnpairedEncoder(tokenizer)

    def arrange(self, rows: Iterable[Numbered], dropped: Counter[str]) -> Iterator[Numbered]:
        """Split pairs into a wanted and an unwanted answer, and exchange the answers of neighbouring rows."""
        single = (one for row in rows for one in _single(row))
        if not self.kl:
            yield from single
            return
        last: Numbered | None = None  # of the group before, for a group of one row
        while group := list(islice(single, GROUP)):
            before = [group[-1] if len(group) > 1 or last is None else last, *group[:-1]]
            for (number, mark, example), (_, _, other) in zip(group, before, strict=True):
                labelled = example.labelled
                yield number, mark, replace(example, rejected=_exchanged(example, other)) if labelled else example
            last = group[-1]

    def refused(self, unit: Unit) -> str | None:
        return None

    def shorten(self, unit: Unit, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """Shorten the documents of a row to fit into one row of a batch; see `Pairs.shorten`."""
        return super().shorten(unit, config, bos) if self.kl else truncate(unit[0], config.max_length, config.truncation, bos)

    def label_text(self, document: Encoded) -> str:
        return {1.0: "wanted", -1.0: "unwanted"}.get(float(document.labels[0]), "for the KL divergence")


def _single(row: Numbered) -> list[Numbered]:
    """Return a row with one answer as it is, and a pair as two rows."""
    number, mark, example = row
    if example.rejected is None:
        return [row]
    halves = (replace(example, rejected=None), True), (example.rejected, False)
    return [
        (number, digest(f"{mark} {wanted}"), replace(half, wanted=wanted, labelled=True, margin=None))
        for half, wanted in halves
    ]


def _exchanged(example: Example, other: Example) -> Example:
    """Return the prompt of one example with the answer of another."""
    answer = () if other.messages is None else other.messages[other.prompt_turns :]
    completion = other.completion
    if completion is None:
        completion = next((turn["content"] for turn in answer if isinstance(turn.get("content"), str)), "")
    if other.messages is None:
        answer = ({"role": "assistant", "content": completion},)
    messages = None if example.messages is None else (*example.messages[: example.prompt_turns], *answer)
    return replace(
        example, completion=None if example.prompt is None else completion, messages=messages, labelled=False, rejected=None
    )
