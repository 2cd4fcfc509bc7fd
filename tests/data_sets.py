"""Writes small data sets and inspects batches, for tests."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from data_tokenizers import byte_level

from ftjax.config.data import DataConfig
from ftjax.data.pipeline import load_splits

WORDS = [
    "Hello",
    "world",
    "how",
    "are",
    "you",
    "today",
    "I",
    "am",
    "fine",
    "thank",
    "the",
    "answer",
    "once",
    "upon",
    "a",
    "time",
]


def write_rows(path: Path, count: int, seed: int = 0, longest: int = 12) -> Path:
    """Write `count` distinct rows of various lengths."""
    rng = np.random.default_rng(seed)
    rows = [
        {"prompt": f"{n} {' '.join(rng.choice(WORDS, rng.integers(1, longest)))}", "completion": f" {rng.choice(WORDS)} {n}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path, *, seed: int = 0, tokenizer=None, **options):
    """Load the training set."""
    return load_splits(
        DataConfig(train=str(path) if isinstance(path, Path) else path, **options), tokenizer or byte_level(), seed=seed
    )[0]


def documents_in(batch) -> list[tuple[int, ...]]:
    """Return the token ids of every document in a batch."""
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        found += [tuple(tokens[segments == segment].tolist()) for segment in range(1, segments.max() + 1)]
    return found


def counted(batches) -> Counter:
    return Counter(document for batch in batches for document in documents_in(batch))


def whole(split) -> Counter:
    """Return every document of a data set once."""
    return Counter(tuple(split.documents.document(number).tokens.tolist()) for number in split.chosen)


def same(one, other) -> bool:
    return len(one) == len(other) and all((a[key] == b[key]).all() for a, b in zip(one, other, strict=True) for key in a)
