"""Memorisation of the data.

A row is given up to a point and continued greedily; it counts as memorised if the next `verbatim_length` tokens are those of
the data (Carlini et al. 2022, arXiv:2202.07646, definition 3.1). Rows that the model has not trained on show how many
continuations can be guessed: a task whose answers follow from the prompt is learned, not memorised.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher

from ftjax.evaluate.check.material import Piece
from ftjax.generate.session import Generator


def continued(generator: Generator, pieces: Sequence[Piece], batch_size: int) -> list[dict[str, float]]:
    """Return for each piece `verbatim` (0 or 1), and `run`, the longest run of its tokens in the answer, as a share."""
    longest = max((len(piece.following) for piece in pieces), default=1)
    answers = generator.generate([piece.prompt for piece in pieces], max_new_tokens=longest, batch_size=batch_size)
    found = []
    for piece, answer in zip(pieces, answers, strict=True):
        match = SequenceMatcher(None, answer.tokens, piece.following, autojunk=False).find_longest_match()
        exact = answer.tokens[: len(piece.following)] == piece.following
        found.append({"verbatim": float(exact), "run": match.size / len(piece.following)})
    return found
