"""Aligns the tokens of a text in one tokenizer with those of the same text in another, as TRL's `GOLDTrainer` does.

Both divide the text at some of the same places. What lies between two of these is a group: tokens of one that stand for the
same bytes as tokens of the other. The answer ` four!` of a student with the tokens `_ f our !` and of a teacher with `_four !`:

    student    [_ f our]  [!]  </s>
    teacher    [_four]    [!]  <end>

Only the trained text is aligned: the prompts may be written by different chat templates. Each run of trained tokens is compared
with the other's run of the same number, without white space before it that one lacks, up to the first byte in which they
differ; the special tokens that end both are a group of their own.

Arrays name a token by the place of the one before it, which predicts it, counted from 1; 0 is none.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from ftjax.data.encoder import Encoded
from ftjax.data.token_bytes import TokenBytes

VALUES = ("token", "position", "segment", "of", "link", "partner")  # of each token of a row, in this order (`lay_out`)


class Pair(NamedTuple):
    """A document of the student with the teacher's.

    Attributes:
        tokens: of the teacher's document.
        of: for each of its tokens that is not the last of its group: the student's token that predicts its group's end.
        links: the same for the student's tokens.
        partners: for the student's token that predicts a group's end: the teacher's that does.
    """

    tokens: Int32[np.ndarray, " teacher"]
    of: Int32[np.ndarray, " teacher"]
    links: Int32[np.ndarray, " student"]
    partners: Int32[np.ndarray, " student"]

    @property
    def aligned(self) -> int:
        """The number of the student's tokens that are in a group."""
        return int(np.count_nonzero(self.links) + np.count_nonzero(self.partners))


def align(own: Encoded, other: Encoded, texts: TokenBytes, others: TokenBytes) -> Pair:
    """Align the trained tokens of a student's document with those of a teacher's.

    Args:
        texts: of the student's tokens.
        others: of the teacher's.
    """
    found = Pair(other.tokens, *(np.zeros(len(one.tokens), np.int32) for one in (other, own, own)))
    for mine, theirs in zip(_runs(own.weights), _runs(other.weights), strict=False):
        for first, last, their_first, their_last in _groups(own.tokens, mine, texts, other.tokens, theirs, others):
            if first and their_first:  # nothing predicts the first token of a document
                found.links[first - 1 : last - 1] = found.of[their_first - 1 : their_last - 1] = last
                found.partners[last - 1] = their_last
    return found


def lay_out(labels: Float32[np.ndarray, "T values"], pair: Pair, at: int, beside: int, segment: int) -> None:
    """Write a pair into the labels of a row.

    Args:
        labels: `VALUES` of each token, and perhaps more.
        at: place of the student's document in the row.
        beside: place of the teacher's.
        segment: of the teacher's.
    """
    here, there = slice(at, at + len(pair.links)), slice(beside, beside + len(pair.tokens))
    labels[there, :3] = np.stack([pair.tokens, np.arange(len(pair.tokens)), np.full(len(pair.tokens), segment)], axis=1)
    for values, place, name, start in (
        (pair.of, there, "of", at), (pair.links, here, "link", at), (pair.partners, here, "partner", beside),
    ):  # fmt: skip
        labels[place, VALUES.index(name)] = np.where(values, values + start, 0)


def _runs(weights: Float32[np.ndarray, " T"]) -> Iterator[slice]:
    """Yield the runs of trained tokens."""
    edges = np.flatnonzero(np.diff((weights > 0).astype(np.int8), prepend=0, append=0))
    yield from (slice(int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def _groups(
    tokens: Int32[np.ndarray, " T"], run: slice, texts: TokenBytes,
    other_tokens: Int32[np.ndarray, " S"], other_run: slice, others: TokenBytes,
) -> Iterator[tuple[int, int, int, int]]:  # fmt: skip
    """Yield first and last token of each group, on both sides, as places in the documents."""
    sides = [_Text(part[where].tolist(), bytes_of) for part, where, bytes_of in (
        (tokens, run, texts), (other_tokens, other_run, others),
    )]  # fmt: skip
    starts = _starts(sides[0].text, sides[1].text)
    same = _same(*(side.text[start:] for side, start in zip(sides, starts, strict=True)))
    ends = [side.ends - start for side, start in zip(sides, starts, strict=True)]
    borders = np.intersect1d(*(one[(one > 0) & (one <= same)] for one in ends))
    firsts, lasts = [], []
    for one, where in zip(ends, (run, other_run), strict=True):
        last = np.searchsorted(one, borders, side="right") - 1
        firsts.append(where.start + np.concatenate([np.searchsorted(one, [0], side="right"), last + 1])[: len(last)])
        lasts.append(where.start + last)
    yield from zip(*(x.tolist() for x in (firsts[0], lasts[0], firsts[1], lasts[1])), strict=True)
    whole = not any(side.text[start + same :].strip() for side, start in zip(sides, starts, strict=True))
    if whole and all(side.ended for side in sides):
        mine, theirs = (where.start + len(side.ends) for side, where in zip(sides, (run, other_run), strict=True))
        yield mine, mine, theirs, theirs


class _Text:
    """The text of a run of tokens up to the first special one.

    Attributes:
        ends: bytes of the text up to the end of each token.
        ended: whether a special token follows that can end a text.
    """

    def __init__(self, tokens: list[int], bytes_of: TokenBytes):
        count = next((at for at, token in enumerate(tokens) if not bytes_of.plain(token)), len(tokens))
        self.ended = count < len(tokens) and tokens[count] in bytes_of.ends
        self.text = bytes_of.text(tokens[:count])
        sizes = [len(bytes_of.of[token]) for token in tokens[:count]]
        self.ends: Int64[np.ndarray, " tokens"] = np.cumsum(sizes, dtype=np.int64)


def _starts(text: bytes, other: bytes) -> tuple[int, int]:
    """Return where the text that both have begins in each: after white space that the other lacks, or after what the template
    of one puts before the answer."""
    own, theirs = len(text) - len(text.lstrip()), len(other) - len(other.lstrip())
    both = _same(text[:own][::-1], other[:theirs][::-1])
    own, theirs = own - both, theirs - both
    core, other_core = text.strip(), other.strip()
    if core and other_core and not _same(core, other_core):
        if (at := other.find(core)) >= 0:
            return own, at
        if (at := text.find(other_core)) >= 0:
            return at, theirs
    return own, theirs


def _same(text: bytes, other: bytes) -> int:
    """Return the number of bytes with which both begin."""
    size = min(len(text), len(other))
    unlike = np.flatnonzero(np.frombuffer(text, np.uint8, size) != np.frombuffer(other, np.uint8, size))
    return int(unlike[0]) if len(unlike) else size
