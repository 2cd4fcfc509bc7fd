"""Documents into rows of a fixed length: best fit, decreasing within a window of lookahead."""

from bisect import bisect_left, insort

import numpy as np

LOOKAHEAD = 8192  # documents that are looked at together


def pack(lengths: np.ndarray, capacity: int, rng: np.random.Generator | None) -> list[list[int]]:
    """Rows of document numbers, none longer than `capacity` tokens.

    With `rng`, documents are shuffled before and rows after packing; without it, the order is that of the data.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    rows: list[list[int]] = []
    for start in range(0, len(order), LOOKAHEAD):
        window = order[start : start + LOOKAHEAD]
        window = window[np.argsort(-lengths[window], kind="stable")]
        free: list[tuple[int, int]] = []  # (tokens left, row), sorted
        for document in window.tolist():
            size = int(lengths[document])
            at = bisect_left(free, (size, -1))
            if at < len(free):
                left, row = free.pop(at)
                rows[row].append(document)
            else:
                left, row = capacity, len(rows)
                rows.append([document])
            if left > size:
                insort(free, (left - size, row))
    if rng is not None:
        rows = [rows[i] for i in rng.permutation(len(rows))]
    return rows
