"""Rows of documents and padding, for tests of layers that carry a state."""

import numpy as np

ROWS = {  # lengths of the documents of two rows; negative: padding
    "whole": ([53], [53]),
    "packed": ([20, 16, 14, -3], [1, 1, 31, -10, 10]),
    "left padded": ([-5, 48], [-1, 30, 22]),
    "padding within a chunk": ([7, -20, 9, -17], [-53]),
}


def segments(lengths: list[int]) -> np.ndarray:
    """Return the segment ids of a row."""
    ids = np.cumsum(np.array(lengths) > 0) * (np.array(lengths) > 0)
    return np.repeat(ids, np.abs(lengths)).astype(np.int32)
