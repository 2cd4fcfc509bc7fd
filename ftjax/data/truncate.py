"""Truncation of documents that are longer than a row (`data.truncation`)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ftjax.data.encoder import Encoded
from ftjax.errors import UserError


def truncate(document: Encoded, length: int, policy: str, bos: int | None) -> Sequence[Encoded]:
    """Split or shorten a document into documents of at most `length` tokens.

    `right` keeps its beginning, `left` its end, `middle` a half of both (dropping the tokens between them). `split` keeps
    all of it as several documents in which each token is trained exactly once. `drop` keeps nothing. A BOS stays at the
    start.

    `[<s> a b c d]` of 3: right `[<s> a b]`, left `[<s> c d]`, middle `[<s> a d]`, split `[<s> a b] [<s> c d]`.

    Raises UserError, with file and line, for `error`.
    """
    if policy == "drop":
        return []
    if policy == "error":
        raise UserError(
            f"{document.where}: {len(document.tokens)} tokens are more than data.max_length {length}; raise it, or choose "
            "data.truncation: drop, right, left, middle or split"
        )
    head = 1 if bos is not None and document.tokens[0] == bos and length > 2 else 0
    total = len(document.tokens)
    if policy == "right":
        return [_part(document, np.arange(length))]
    if policy == "left":
        return [_part(document, np.r_[:head, total - length + head : total])]
    if policy == "middle":
        front = -(-length // 2)
        return [_part(document, np.r_[:front, total - (length - front) : total])]
    # The first token of a document is never a target, so without a BOS each piece begins with the last token of the piece
    # before, as context.
    step = length - 1
    pieces = [_part(document, np.arange(min(length, total)))]
    for start in range(length, total, step):
        rest = np.arange(start, min(start + step, total))
        piece = _part(document, np.r_[0 if head else start - 1, rest])
        piece.weights[0] = 0.0
        pieces.append(piece)
    return pieces


def _part(document: Encoded, index: np.ndarray) -> Encoded:
    return replace(document, tokens=document.tokens[index], weights=document.weights[index])
