"""Prompts of all lengths as a few arrays of a few shapes."""

import math
from collections.abc import Sequence

from ftjax.generate.cache import bucket

SCORES = 1 << 26  # attention scores of one block of a prompt, in numbers (256 MiB in float32), over all rows


def groups(lengths: Sequence[int], batch_size: int, shards: int = 1) -> tuple[list[list[int]], int]:
    """`(indices of each batch, rows of every batch)`: sorted by length, the longest first, and cut evenly.

    Rows are rounded up, and to a multiple of the devices that they lie on; what is not filled is padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = math.ceil(len(order) / batch_size)
    size = math.ceil(len(order) / max(1, count))
    rows = math.ceil(bucket(max(1, size)) / shards) * shards
    return [order[at : at + size] for at in range(0, len(order), max(1, size))], rows


def block_length(rows: int, length: int, slots: int, heads: int) -> int:
    """How many tokens of each prompt go through the model at a time: all, or a half, a quarter ... of `length`."""
    block = length
    while block % 2 == 0 and rows * heads * block * slots > SCORES:
        block //= 2
    return block
