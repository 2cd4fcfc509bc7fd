"""Packs documents into rows of a fixed length: best fit, longest first.

Each document goes into the fullest row that still has room for it. All documents of one length and all rows with the same
room are handled together, so the work grows with the number of distinct lengths, not of documents: `pack([5, 3, 3, 2], 8)`
gives the rows `[5, 3]` and `[3, 2]`.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Rows of document numbers: row `r` holds `documents[starts[r] : starts[r + 1]]`."""

    documents: np.ndarray  # int64 [D]
    starts: np.ndarray  # int64 [R + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `(documents, count)`: the documents of these rows in row order, and the number per row.

        Args:
            rows: row numbers; a number past the last row means an empty row.
        """
        low, high = (self.starts[np.minimum(edge, len(self))] for edge in (rows, rows + 1))
        count = high - low
        before = np.cumsum(count) - count  # documents of earlier rows
        return self.documents[np.repeat(low - before, count) + np.arange(count.sum())], count


def pack(lengths: np.ndarray, capacity: int, rng: np.random.Generator | None) -> Plan:
    """Plan rows of at most `capacity` tokens that contain every document exactly once.

    Args:
        lengths: `[D]`, tokens of each document, 1 to `capacity`.
        rng: shuffles documents of equal length, the order within a row and the order of rows. Without it, rows are in the
            order of their first document.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths must be 1 to {capacity}; found {lengths.min()} to {lengths.max()}")
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows = _best_fit(lengths[order], capacity)
    count = int(rows.max()) + 1 if len(rows) else 0
    if rng is None:
        first = np.full(count, len(lengths))
        np.minimum.at(first, rows, order)
        rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")
        keys = (order, rank[rows])
    else:
        keys = (rng.random(len(order)), rng.permutation(count)[rows] if count else rows)
    sort = np.lexsort(keys)
    sizes = np.bincount(keys[1], minlength=count) if count else np.zeros(0, np.int64)
    return Plan(order[sort], np.concatenate([[0], np.cumsum(sizes)]))


def in_order(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the `starts` of a plan that keeps the documents in order: each row takes as many as fit.

    `in_order([5, 3, 3, 2], 8)` is `[0, 2, 4]`.
    """
    ends = np.cumsum(lengths)
    starts = [0]
    while starts[-1] < len(lengths):
        before = ends[starts[-1]] - lengths[starts[-1]]
        starts.append(int(np.searchsorted(ends, before + capacity, side="right")))
    return np.array(starts)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each document; `lengths` are in descending order."""
    rows = np.empty(len(lengths), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # free tokens: the rows with that much room, in chunks
    free: list[int] = []  # the keys of room, ascending
    count = 0
    edges = np.flatnonzero(np.diff(lengths)) + 1
    for start, stop in zip(np.r_[0, edges], np.r_[edges, len(lengths)], strict=True) if len(lengths) else ():
        size = int(lengths[start])
        while start < stop:
            at = bisect_left(free, size)
            if at < len(free):  # the rows with the tightest fit
                left = free[at]
                parts = room[left]
                chosen = parts.pop()
                if len(chosen) > stop - start:
                    parts.append(chosen[stop - start :])
                    chosen = chosen[: stop - start]
                if not parts:
                    del room[left], free[at]
            else:  # new rows, each with as many of these documents as fit
                left = capacity
                each = capacity // size
                new = -(-int(stop - start) // each)
                if each > 1 and new > 1:
                    full = new - 1
                    rows[start : start + full * each] = count + np.repeat(np.arange(full), each)
                    _put(room, free, capacity - each * size, np.arange(count, count + full))
                    start, count = start + full * each, count + full
                    continue
                chosen = np.arange(count, count + min(new, stop - start))
                if each > 1:
                    chosen = chosen[:1]
                count += len(chosen)
            rows[start : start + len(chosen)] = chosen
            start += len(chosen)
            _put(room, free, left - size, chosen)
    return rows


def _put(room: dict[int, list[np.ndarray]], free: list[int], left: int, rows: np.ndarray) -> None:
    if not left or not len(rows):
        return
    if left not in room:
        room[left] = []
        insort(free, left)
    room[left].append(rows)
