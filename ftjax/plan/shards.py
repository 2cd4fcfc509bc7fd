"""Bytes of arrays on one device, from shapes and shardings."""

import math
from typing import Any

import jax


def shard_bytes(values: Any) -> float:
    """Return the bytes on one device of a tree of shapes with shardings."""
    return float(
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(values))
    )
