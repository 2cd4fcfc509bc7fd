"""Documents as text, token by token, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftjax.data.encoder import Encoded, Unit
from ftjax.data.encoding import RowEncoding
from ftjax.errors import printable

LONGEST = 400  # most tokens of an example that a terminal shows


@dataclass(frozen=True)
class Shown:
    """One document, token by token: the text of each token (together they are the document's text), its weight and its
    place.

    Attributes:
        caption: what the document is among those of its row, such as `chosen`; "" for the only one.
        parts_at: the first token in which the two documents of a row differ.
    """

    where: str
    ids: list[int]
    texts: list[str]
    weights: list[float]
    row: int | None = None  # of the first epoch
    segment: int | None = None
    caption: str = ""
    parts_at: int | None = None

    @property
    def trained(self) -> int:
        """Number of tokens that are trained as targets."""
        return int(np.count_nonzero(np.array(self.weights[1:])))


def show_unit(
    unit: Unit, tokenizer: Any, encoding: RowEncoding, row: int | None = None, segment: int | None = None
) -> list[Shown]:
    """Return the documents of a row. A last token that stands for a label shows it as words.

    Args:
        row, segment: place of the first document.
    """
    found, at = [], parting(unit)
    for number, (document, caption) in enumerate(zip(unit, encoding.captions(unit), strict=True)):
        item = shown(document, tokenizer)
        if (words := encoding.label_text(document)) is not None:
            item.texts[-1] = f" -> {words}"
        own = None if segment is None else segment + number
        found.append(replace(item, row=row, segment=own, caption=caption, parts_at=at))
    return found


def shown(document: Encoded, tokenizer: Any) -> Shown:
    ids = document.tokens.tolist()
    return Shown(document.where, ids, token_texts(ids, tokenizer), document.weights.tolist())


def parting(unit: Sequence[Encoded]) -> int | None:
    """Return the first position at which two documents differ; None for one document."""
    if len(unit) != 2:
        return None
    one, other = (document.tokens for document in unit)
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


def token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """Return the text of each token, so that they join to the decoded text. A token that holds part of a character is
    empty; the token that completes the character holds it."""
    texts: list[str] = []
    # Decoding begins a few tokens earlier, at a character boundary: a token's text depends on those before it.
    begins, before, last = [0], "", 0
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[begins[0] : end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if whole.endswith("\ufffd") and end < len(ids) and end - last < 32:
            texts.append("")
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else whole)
        begins, last = [*begins, end][-4:], end
        before = tokenizer.decode(ids[begins[0] : end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts


def render(item: Shown, start: int = 0) -> str:
    """Render a document from token `start` on as text with trained parts in [[ and ]]; the middle of a long one is left out."""
    parts, inside = [f"[... {start:,} tokens ...] "] if start else [], False
    skipped = len(item.ids) - start - LONGEST
    for number, (text, weight) in enumerate(zip(item.texts[start:], item.weights[start:], strict=True)):
        if skipped > 0 and LONGEST // 2 <= number < LONGEST // 2 + skipped:
            text = f" [... {skipped:,} tokens ...] " if number == LONGEST // 2 else ""
        now = weight > 0
        if now != inside:
            parts.append("[[" if now else "]]")
            inside = now
        parts.append(printable(text))
    return "".join(parts) + ("]]" if inside else "")
