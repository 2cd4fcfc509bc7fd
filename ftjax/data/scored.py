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
from ftjax.data.pairs import PairEncoder, Pairs, refuse_trained_prompts


class ScoredEncoder(PairEncoder):
    """Encodes a row as two conversations whose last tokens are scored, each with the margin of the row."""

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
        refuse_trained_prompts(config)
        return ScoredEncoder(tokenizer)

    def shorten(self, unit: Unit, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """Shorten the conversations as `Pairs.shorten` does; the last token that remains is scored."""
        bare = tuple(replace(one, tokens=one.tokens[:-1], weights=np.ones(len(one.tokens) - 1, np.float32)) for one in unit)
        room = config.model_copy(update={"max_length": config.max_length - len(unit)})
        return [_scored(document) for document in super().shorten(bare, room, bos)]

    def label_text(self, document: Encoded) -> str | None:
        return f"margin {document.labels[0]:g}" if document.labels[0] else None


def _scored(document: Encoded) -> Encoded:
    weights = np.zeros(len(document.tokens) + 1, np.float32)
    weights[-1] = 1.0
    return replace(document, tokens=np.append(document.tokens, np.int32(0)), weights=weights)
