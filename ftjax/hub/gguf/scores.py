"""Finds the scores of SentencePiece that lead to the merges of a tokenizer.json: the inverse of
`ftjax.hub.tokenizer.sentencepiece_bpe.merges`."""

from collections.abc import Sequence
from pathlib import Path

from ftjax.hub.tokenizer.sentencepiece_bpe import Kind, merges
from ftjax.hub.tokenizer.sentencepiece_folder import SENTENCEPIECE, read_pieces, read_proto


def piece_scores(
    merged: Sequence[str | Sequence[str]], tokens: Sequence[str], kinds: Sequence[Kind], folder: Path | None
) -> list[float] | None:
    """Return a score for each token that gives these merges; None if there are no such scores.

    They are those of SentencePiece's model, if it is at hand, or else numbers in the order of the merges.

    Args:
        merged: the merges of a tokenizer.json, in order.
        folder: where `tokenizer.model` may be.
    """
    plain = {piece for piece, kind in zip(tokens, kinds, strict=True) if kind in (Kind.NORMAL, Kind.UNUSED)}
    split = (tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merged)
    pairs = [(left, right) for left, right in split if {left, right, left + right} <= plain]
    groups = _groups([left + right for left, right in pairs])
    own = [-float(groups.get(piece, len(groups))) for piece in tokens]
    candidates = [own]
    if folder is not None and (folder / SENTENCEPIECE).is_file():
        known = read_pieces(folder / SENTENCEPIECE) or []
        if known and [*tokens[: len(known)]] == known:
            stored = [piece.score for piece in read_proto(folder / SENTENCEPIECE).pieces]
            candidates.insert(0, stored + own[len(stored) :])
    for scores in candidates:
        score = dict(zip(tokens, scores, strict=True))
        falling = [score[left + right] for left, right in pairs]
        if falling == sorted(falling, reverse=True) and set(pairs) == set(merges(tokens, scores, kinds)):
            return scores
    return None


def _groups(made: Sequence[str]) -> dict[str, int]:
    """Return a number for each piece in the order in which merges make them, the same for runs of one character that
    alternate, such as Gemma's of spaces."""
    first: dict[str, int] = {}
    for number, piece in enumerate(made):
        first.setdefault(piece, number)
    last = {piece: number for number, piece in enumerate(made)}
    found: dict[str, int] = {}
    group, end = -1, -1
    for piece, number in first.items():
        group += number > end or len(set(piece)) > 1
        end = max(end, last[piece])
        found[piece] = group
    return found
