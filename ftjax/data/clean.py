"""Exact and near duplicates, content digests, the validation split and Unicode normalisation."""

import json
import re
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import xxhash

from ftjax.config.data import DataConfig
from ftjax.data.example import Example, Message

SHINGLE = 3  # words, or characters in scripts without spaces between words
# Chinese, Japanese, Thai, Lao, Tibetan, Burmese and Khmer
SPACELESS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+")
PERMUTATIONS = 128


def content(example: Example) -> str:
    """Return the content of a row without its location: rows with the same content give the same text."""
    if example.input_ids is not None:
        return json.dumps([example.input_ids, example.labels])
    if example.text is not None:
        return example.text
    rejected = None if example.rejected is None else _said(example.rejected)
    parts = [_said(example), rejected, example.tools, example.template_arguments]
    if example.labelled or example.margin is not None:
        parts += [example.wanted, example.margin]
    return json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)


def _said(example: Example) -> list:
    return [example.prompt, example.completion] if example.prompt is not None else list(map(_plain, example.messages))


def _plain(message: Message) -> Message:
    """Return the message without flags that repeat the default."""
    return {k: v for k, v in message.items() if not (k in ("train", "weight") and v == 1 and message["role"] == "assistant")}


def digest(text: str) -> int:
    """Return a 64-bit hash of a row's content."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


class Duplicates:
    """Finds contents that were seen before: exactly, or (`near`) with mostly the same word 3-grams (character 3-grams in
    scripts without spaces).

    Near duplicates are found by MinHash (Broder 1997) with locality-sensitive hashing, from `datasketch`.
    """

    def __init__(self, kind: str, threshold: float):
        self.near = kind == "near"
        self._seen: set[int] = set()
        self._indices: dict[Hashable, Any] = {}
        if self.near:
            from datasketch import MinHash

            self._hashes: list[MinHash] = []
            self._threshold, self._new = threshold, MinHash(num_perm=PERMUTATIONS)

    def reason(self, text: str, number: int, label: Hashable = None) -> str | None:
        """Return why this content should be dropped; None for a new one, which is remembered.

        Args:
            number: hash of the text.
            label: contents with different labels are no near duplicates.
        """
        if number in self._seen:
            return "exact duplicates"
        self._seen.add(number)
        if not self.near:
            return None
        if label not in self._indices:
            self._indices[label] = self._new_index()
        index = self._indices[label]
        words = WORD.findall(text.lower())
        if not words:
            return None
        shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        sketch = self._new.copy()
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        if any(sketch.jaccard(self._hashes[other]) >= self._threshold for other in index.query(sketch)):
            return "near duplicates"
        index.insert(len(self._hashes), sketch)
        self._hashes.append(sketch)
        return None

    def _new_index(self) -> Any:
        from datasketch import MinHashLSH

        # Candidates are compared again, so the index favours recall.
        return MinHashLSH(threshold=min(self._threshold, 0.9), num_perm=PERMUTATIONS, weights=(0.1, 0.9))


def held_out(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose the rows of the validation split by content and seed: a `share` of them (below 1) or that many.

    Rows with the same content are on the same side, and a row keeps its side when other rows are added or moved (as far as
    their number allows). If at least two contents differ, each side gets at least one row.
    """
    distinct, counts = np.unique(digests, return_counts=True)
    if len(distinct) < 2:
        return np.zeros(len(digests), bool)
    wanted = round(share * len(digests)) if share < 1 else int(share)
    key = xxhash.xxh3_64_intdigest(f"validation_split {seed}".encode())
    order = np.argsort(_mixed(distinct ^ np.uint64(key)), kind="stable")
    total = np.cumsum(counts[order])
    number = int(np.searchsorted(total, max(wanted, 1), side="right"))  # whole groups that fit, in order
    chosen, left = list(order[:number]), max(wanted, 1) - (int(total[number - 1]) if number else 0)
    for group in order[number:]:
        if left <= 0:
            break
        if counts[group] <= left:
            chosen.append(group)
            left -= int(counts[group])
    chosen = chosen or [order[int(np.argmin(counts[order]))]]
    return np.isin(digests, distinct[chosen[: len(distinct) - 1]])


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix the bits with splitmix64's finaliser, so that each seed gives another order."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def normalizer(config: DataConfig) -> Callable[[str], str] | None:
    """Return a function that changes every text as the settings say (Unicode normalisation, masks), or None."""
    import unicodedata

    from ftjax.data.personal import mask

    form, masks = config.unicode_normalization, config.personal_data == "mask"
    if form is None:
        return mask if masks else None

    def normalize(text: str) -> str:
        text = text if text.isascii() else unicodedata.normalize(form, text)
        return mask(text) if masks else text

    return normalize
