"""Group prompts of different lengths into batches with few distinct shapes."""

import math
from collections.abc import Sequence

from ftjax.generate.cache import bucket

SCORES = 1 << 26  # most attention scores per prefill block on a device, over all of its rows (256 MiB in float32)


def groups(lengths: Sequence[int], batch_size: int, shards: int = 1) -> tuple[list[list[int]], int]:
    """Return `(indices of each batch, rows per batch)`, sorted by length (longest first) and divided evenly.

    The number of rows is rounded up to a bucket and to a multiple of `shards`; unused rows are padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = math.ceil(len(order) / batch_size)
    size = math.ceil(len(order) / max(1, count))
    rows = math.ceil(bucket(max(1, size)) / shards) * shards
    return [order[at : at + size] for at in range(0, len(order), max(1, size))], rows


def block_length(rows: int, length: int, slots: int, heads: int) -> int:
    """Return the number of tokens of each prompt per prefill step: `length`, or a half, a quarter ... of it.

    Args:
        rows, heads: of a device.
    """
    block = length
    while block % 2 == 0 and rows * heads * block * slots > SCORES:
        block //= 2
    return block
