"""The documents of a student together with those of a teacher that has another tokenizer, made of the same rows of data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from ftjax.data.align import VALUES, Pair, align, lay_out
from ftjax.data.encoder import Encoded
from ftjax.data.store import Documents
from ftjax.data.token_bytes import TokenBytes
from ftjax.data.tokens import Tokens
from ftjax.errors import UserError, printable

LOOKED_AT = 200  # documents whose share of aligned tokens is reported
LEAST = 0.5  # of that share: with less, the texts are not the same
ALL = 0.99  # with less, a warning says so
SHOWN = 80  # characters of a text in messages


@dataclass(frozen=True)
class Partners:
    """The teacher's document for each of the student's.

    Attributes:
        own: the student's documents.
        other: the teacher's.
        numbers: of the teacher's document, by that of the student's; -1 for none.
        texts, others: bytes of the tokens of student and teacher.
        tokenizer: the teacher's.
        values: of each token in a batch; those beyond `VALUES` are 1 for tokens of the data.
    """

    own: Documents
    other: Documents
    numbers: Int64[np.ndarray, " D"]
    texts: TokenBytes
    others: TokenBytes
    tokenizer: Any
    values: int = len(VALUES)

    @classmethod
    def of(
        cls, own: Documents, other: Documents, texts: TokenBytes, others: TokenBytes, tokenizer: Any, values: int
    ) -> "Partners":  # fmt: skip
        """Pair the documents of the same rows."""
        numbers = np.full(len(own), -1)
        if len(other):
            inside = np.minimum(np.searchsorted(other.row, own.row), len(other) - 1)
            same = (other.row[inside] == own.row) & (other.digest[inside] == own.digest)
            numbers[same] = inside[same]
        return cls(own, other, numbers, texts, others, tokenizer, values)

    @cached_property
    def _continued(self) -> Tokens:
        return Tokens(self.tokenizer)

    def sizes(self, documents: Int64[np.ndarray, "*of"]) -> Int64[np.ndarray, "*of"]:
        """Return the tokens of the teacher's documents."""
        return np.diff(self.other.starts)[self.numbers[documents]]

    def pair(self, document: int) -> Pair:
        """Return a document of the student with the teacher's."""
        other = self.other.document(self.numbers[document])
        return align(self.own.document(document), other, self.texts, self.others)

    def answered(
        self, prompt: Sequence[int], answer: Sequence[int], ended: bool, other_prompt: Sequence[int], room: int
    ) -> Pair:  # fmt: skip
        """Return an answer that the student generated, with the teacher's tokens for its text.

        Args:
            prompt, other_prompt: of student and teacher.
            ended: whether its last token ends it.
            room: tokens that the teacher's document may have.
        """
        text = self.texts.text(answer).decode("utf-8", "replace")
        encoding, first, _ = self._continued.continuation(text)
        ids = encoding.ids[first:]
        if ended and self.others.eos is not None:
            ids = [*ids, self.others.eos]
        made = []
        for before, after in ((prompt, answer), (other_prompt, ids[: max(0, room - len(other_prompt))])):
            weights = np.repeat(np.array([0, 1], np.float32), [len(before), len(after)])
            made.append(Encoded(np.array([*before, *after], np.int32), weights, "an answer"))
        return align(*made, self.texts, self.others)

    def fill(
        self, documents: Int64[np.ndarray, " D"], count: Int64[np.ndarray, " B"], width: int
    ) -> Float32[np.ndarray, "B tokens"]:
        """Return the labels of rows of these documents, flattened token by token.

        Args:
            count: documents of each row.
        """
        labels, coming = np.zeros((len(count), width, self.values), np.float32), iter(documents.tolist())
        for row, own in enumerate(count.tolist()):
            at = beside = 0
            for segment in range(1, own + 1):
                pair = self.pair(next(coming))
                lay_out(labels[row], pair, at, beside, segment)
                labels[row, at : at + len(pair.links), len(VALUES) :] = 1
                at, beside = at + len(pair.links), beside + len(pair.tokens)
        return labels.reshape(len(count), -1)

    def join(self, split: Any, name: str) -> Any:
        """Return a `PackedSplit` of the student's documents with these partners. Rows that the teacher lacks are dropped.

        Args:
            name: of the teacher.

        Raises UserError if no row is left, or the texts are too different to be aligned.
        """
        split, report = replace(split, partners=self), split.report
        kept = split.chosen[self.numbers[split.chosen] >= 0]
        dropped = len(split.chosen) - len(kept)
        report = replace(report, dropped=Counter(report.dropped), warnings=list(report.warnings), kept=report.kept - dropped)
        if dropped:
            report.dropped["not usable for the teacher"] += dropped
        if not len(kept):
            raise UserError(
                f"{report.source}: none of the rows can be used with the tokenizer of the teacher {name}: with it, all are "
                f"longer than data.max_length ({report.max_length}), or have no answer. Raise data.max_length, or choose "
                "another teacher"
            )
        if report.imitated:
            report.warnings += self._compare(kept, report.source, name)
        return split.choose(kept, report)

    def _compare(self, chosen: Int64[np.ndarray, " N"], source: str, name: str) -> list[str]:
        """Align some documents: return a warning if a part of their tokens cannot be. Raises UserError if most cannot."""
        some = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(LOOKED_AT, len(chosen))).astype(int))].tolist()
        counts = [(self.pair(one).aligned, int(self.own.trained[one])) for one in some]
        share = sum(aligned for aligned, _ in counts) / max(1, sum(trained for _, trained in counts))
        worst = some[int(np.argmin([aligned / max(1, trained) for aligned, trained in counts]))]
        documents = (self.own, self.texts, worst), (self.other, self.others, int(self.numbers[worst]))
        mine, theirs = (_shown(where.document(number), texts) for where, texts, number in documents)
        told = f"{self.own.document(worst).where}: the student trains {mine!r}, and the teacher {name} reads {theirs!r}"
        if share < LEAST:
            raise UserError(
                f"{source}: the tokens of student and teacher cannot be aligned, because their texts differ: of {len(some)} "
                f"rows, {share:.0%} of the trained tokens stand for the same text. {told}. Give both the same text "
                "(model.chat_template, data.train_on_inputs: false), or choose another teacher"
            )
        if share < ALL:
            return [f"{1 - share:.1%} of the trained tokens have no counterpart in the teacher's text: {told}"]
        return []


def _shown(document: Encoded, texts: TokenBytes) -> str:
    """Return the beginning of what is trained."""
    return printable(texts.text(document.tokens[document.weights > 0].tolist()).decode("utf-8", "replace"))[:SHOWN]
