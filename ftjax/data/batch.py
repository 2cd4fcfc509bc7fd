"""One batch: rows of packed documents as arrays.

One row of 12 tokens that holds two documents, `<s> Hi _there </s>` (weights 0 0 1 1) and `<s> Q A </s>` (0 0 1 1):

    tokens       1 15 31  2  1 40 41  2  0  0  0  0
    targets     15 31  2  0 40 41  2  0  0  0  0  0     the token that follows in the same document
    weights      0  1  1  0  0  1  1  0  0  0  0  0     that of the target
    positions    0  1  2  3  0  1  2  3  0  0  0  0
    segment_ids  1  1  1  1  2  2  2  2  0  0  0  0

Texts with several labels (or numbers) also have `labels`: the values of the text at the token that carries weight and zeros at
other tokens, flattened token by token.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


class BatchArray(NamedTuple):
    """One array of a batch: `[rows, T * width]` of `dtype`."""

    dtype: Any
    width: int = 1  # values per token, flattened token by token


KEYS = {
    "tokens": BatchArray(np.int32),
    "targets": BatchArray(np.int32),
    "weights": BatchArray(np.float32),
    "positions": BatchArray(np.int32),
    "segment_ids": BatchArray(np.int32),
}


def batch_arrays(values: int = 0) -> dict[str, BatchArray]:
    """Return the arrays of a batch whose documents carry `values` extra numbers each (`RowEncoding.values`)."""
    return KEYS | ({"labels": BatchArray(np.float32, values)} if values else {})


class BatchIterator(Protocol):
    """Iterates over this process's rows of each batch.

    Each of `KEYS` is `[rows, T]`, and `labels`, if present, `[rows, T * labels]`. The state is the same on all processes.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, int]:
        """Return the position of the next batch as JSON; it does not depend on the number of processes."""

    def set_state(self, state: dict[str, int]) -> None:
        """Move to the position `state`."""


def own_rows(rows: Sequence[int] | None, batch_size: int) -> np.ndarray:
    """Return the numbers of the rows to build in each batch, as an array.

    Raises ValueError unless they increase and are within the batch.
    """
    own = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    if not len(own) or own[0] < 0 or own[-1] >= batch_size or (np.diff(own) <= 0).any():
        raise ValueError(f"rows of a batch of {batch_size}: expected rising numbers from 0 on, found {own.tolist()}")
    return own


def fill(
    store: Any, starts: np.ndarray, lengths: np.ndarray, per_row: np.ndarray, width: int, labels: np.ndarray | None = None
) -> Batch:
    """Build arrays `[len(per_row), width]` for each of `KEYS` from documents `store.tokens[start : start + length]`.

    Args:
        per_row: the number of documents in each row, in order.
        labels: `[documents, labels]`, written to the second-to-last token of each document.
    """
    arrays = batch_arrays(0 if labels is None else labels.shape[1])
    batch = {
        name: np.zeros((len(per_row) * width, *([one.width] if name == "labels" else [])), one.dtype)
        for name, one in arrays.items()
    }
    if len(starts):
        before = np.cumsum(lengths) - lengths  # tokens of all earlier documents
        first = np.cumsum(per_row) - per_row  # the first document of each row
        row = np.repeat(np.arange(len(per_row)), per_row)
        within = np.arange(int(lengths.sum())) - np.repeat(before, lengths)
        source = np.repeat(starts, lengths) + within
        begin = row * width + before - before[first[row]]
        target = np.repeat(begin, lengths) + within
        segment = np.arange(len(starts)) - first[row] + 1
        batch["tokens"][target] = store.tokens[source]
        batch["positions"][target] = within
        batch["segment_ids"][target] = np.repeat(segment, lengths)
        inner = within < np.repeat(lengths - 1, lengths)  # the last token of a document has no target
        source, target = source[inner] + 1, target[inner]
        batch["targets"][target] = store.tokens[source]
        batch["weights"][target] = store.weights[source]
        if labels is not None:
            batch["labels"][begin + lengths - 2] = labels
    return {name: values.reshape(len(per_row), width * math.prod(values.shape[1:])) for name, values in batch.items()}
