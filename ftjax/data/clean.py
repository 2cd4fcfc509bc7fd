"""Rows that should not be there twice: exact and near duplicates, and a digest of what a row says."""

import json
import re
from collections.abc import Callable

import numpy as np
import xxhash

from ftjax.data.example import Example, Message

SHINGLE = 3  # words, or characters of a script that writes no spaces between words
# Chinese, Japanese, Thai, Lao, Tibetan, Burmese and Khmer
SPACELESS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+")
PERMUTATIONS = 128


def content(example: Example) -> str:
    """What a row says, without where it stood: rows that say the same have the same content."""
    if example.input_ids is not None:
        return json.dumps([example.input_ids, example.labels])
    if example.text is not None:
        return example.text
    said = [example.prompt, example.completion] if example.prompt is not None else list(map(_plain, example.messages))
    facts = [said, example.rejected, example.tools, example.template_arguments]
    return json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)


def _plain(message: Message) -> Message:
    """Without the flags that say what is so anyway."""
    return {k: v for k, v in message.items() if not (k in ("train", "weight") and v == 1 and message["role"] == "assistant")}


def digest(text: str) -> int:
    """64 bits of a content."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


class Duplicates:
    """Tells whether a content was seen before: exactly, or (`near`) so that most word 3-grams are the same (in
    scripts without spaces, those of characters).

    Near duplicates are found by MinHash (Broder 1997) with locality-sensitive hashing, from `datasketch`.
    """

    def __init__(self, kind: str, threshold: float):
        self.near = kind == "near"
        self._seen: set[int] = set()
        self._index = None
        if self.near:
            from datasketch import MinHash, MinHashLSH

            # What the index finds is compared once more, so it may rather find too much than miss some.
            self._index = MinHashLSH(threshold=min(threshold, 0.9), num_perm=PERMUTATIONS, weights=(0.1, 0.9))
            self._hashes: list[MinHash] = []
            self._threshold, self._new = threshold, MinHash(num_perm=PERMUTATIONS)

    def reason(self, text: str, number: int) -> str | None:
        """Why this content should go, or None for one that is new, which is remembered."""
        if number in self._seen:
            return "exact duplicates"
        self._seen.add(number)
        if self._index is None:
            return None
        words = WORD.findall(text.lower())
        if not words:
            return None
        shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        sketch = self._new.copy()
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        if any(sketch.jaccard(self._hashes[other]) >= self._threshold for other in self._index.query(sketch)):
            return "near duplicates"
        self._index.insert(len(self._hashes), sketch)
        self._hashes.append(sketch)
        return None


def held_out(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which rows go to validation: `share` of them (below 1) or so many, by their content and the seed.

    Rows that say the same are on the same side, and a row stays where it is when others are added or moved about it (as far
    as their number leaves it). At least one row is on each side where there are two that differ.
    """
    distinct, counts = np.unique(digests, return_counts=True)
    if len(distinct) < 2:
        return np.zeros(len(digests), bool)
    wanted = round(share * len(digests)) if share < 1 else int(share)
    key = xxhash.xxh3_64_intdigest(f"validation_split {seed}".encode())
    order = np.argsort(_mixed(distinct ^ np.uint64(key)), kind="stable")
    total = np.cumsum(counts[order])
    number = int(np.searchsorted(total, max(wanted, 1), side="right"))  # the groups that fit as a whole, in their order
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
    """splitmix64's finisher: another order for each seed."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def normalizer(form: str | None) -> Callable[[str], str] | None:
    """The Unicode normalisation `form`, or None."""
    if form is None:
        return None
    import unicodedata

    def normalize(text: str) -> str:
        return text if text.isascii() else unicodedata.normalize(form, text)

    return normalize
