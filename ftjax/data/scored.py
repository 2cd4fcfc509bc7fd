"""Pairs of whole conversations that a reward model scores.

A score is read at the last token of each document, its end-of-sequence token or the end of the last turn. One more token after
it, which a causal model cannot see from there, gives that position its weight (`ftjax.data.classes`):

    tokens       1 15 31  2  0  1 15 44  2  0        <s> Hi _there </s> 0   <s> Hi _you </s> 0
    weights      0  0  0  0  1  0  0  0  0  1
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftjax.config.data import DataConfig
from ftjax.data.encoder import Encoded, TextPlan, Unit
from ftjax.data.example import Example
from ftjax.data.pairs import PairEncoder, Pairs, refuse_long, refuse_options, shorten_pair


class ScoredEncoder(PairEncoder):
    """Encodes a row as two conversations whose last tokens are scored, each with the margin of the row.

    A text is tokenised as a whole, as whoever has it scored does: nothing is generated from its prompt. A conversation ends as
    the chat template writes it.
    """

    def plan(self, example: Example) -> Sequence[TextPlan | Encoded]:
        """Plan the chosen and the rejected document of an example; see `RowEncoder.plan`."""
        return [replace(plan, cuts=[], answered=False) for plan in super().plan(example)]

    def encode(self, plan: TextPlan, encodings: list[Any]) -> Encoded:
        """Return the document of a text, with one more token and the row's margin, 0 if it has none."""
        document = super().encode(plan, encodings)
        return _scored(replace(document, labels=np.array([plan.example.margin or 0.0], np.float32)))


@dataclass(frozen=True)
class Scored(Pairs):
    """Each row is a prompt with a chosen and a rejected answer, of which the whole is scored."""

    answers = False

    @property
    def values(self) -> int:
        return 1

    def key(self) -> Any:
        return "scored"

    def encoder(self, tokenizer: Any, config: DataConfig) -> ScoredEncoder:
        refuse_options(config)
        return ScoredEncoder(tokenizer)

    def shorten(self, unit: Unit, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """Shorten the conversations as `shorten_pair` does; the last token that remains is scored."""
        refuse_long(unit, config)
        bare = tuple(replace(one, tokens=one.tokens[:-1], weights=one.weights[:-1]) for one in unit)
        return list(map(_scored, shorten_pair(bare, config.max_length - len(unit), config.truncation, bos)))

    def label_text(self, document: Encoded) -> str:
        return "score"

    def captions(self, unit: Unit) -> Sequence[str]:
        margin = float(unit[0].labels[0])
        return f"chosen (margin {margin:g})" if margin else "chosen", "rejected"


def _scored(document: Encoded) -> Encoded:
    weights = np.zeros(len(document.tokens) + 1, np.float32)
    weights[-1] = 1.0
    return replace(document, tokens=np.append(document.tokens, np.int32(0)), weights=weights)
