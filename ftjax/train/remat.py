"""`model.remat: auto`: keep what costs matrix products where it fits, recompute it where it does not.

`none` is never the choice: to write out the elementwise values of a layer and read them again costs more than to compute them
where they are used (1.2 times the time of a step on a CPU, and twice the memory; docs/performance.md).
"""

import math
import os
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.models.classifier import vector_size
from ftjax.models.model import Model
from ftjax.train.step import Runtime, SumsFn

SHARE = 0.5  # of the device's memory may go to activations


def choose_remat(
    sums_fn: SumsFn, runtime: Runtime, model: Model, dtype: Any, rows: int, length: int, memory: int | None = None
) -> str:
    """What is asked for, or the first of `dots`, `attention` and `full` whose saved activations fit: the fastest.

    The size is exact: the bytes of everything that the backward pass of one device's microbatch keeps, from shapes alone.

    Args:
        dtype: of frozen weights.
        rows: rows of a microbatch on one device.
        memory: bytes of the device; None for this process's own.
    """
    if runtime.remat != "auto":
        return runtime.remat
    budget = SHARE * (memory or device_memory())
    return next(
        (
            policy
            for policy in ("dots", "attention")
            if saved_bytes(sums_fn, runtime, model, dtype, policy, rows, length) < budget
        ),
        "full",
    )


def saved_bytes(sums_fn: SumsFn, runtime: Runtime, model: Model, dtype: Any, policy: str, rows: int, length: int) -> int:
    """Bytes that the forward pass leaves for the backward pass, beyond the parameters themselves."""

    def shapes(specs):
        return {path: spec.abstract for path, spec in specs.items()}

    trainable, frozen = shapes(model.trainable), shapes({path: spec.astype(dtype) for path, spec in model.frozen.items()})
    ints, floats = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = {"tokens": ints, "targets": ints, "weights": floats, "positions": ints, "segment_ids": ints}
    if size := vector_size(model.config):
        batch["labels"] = jax.ShapeDtypeStruct((rows, length * size), jnp.float32)
    runtime = Runtime(runtime.dtype, runtime.attention, policy)

    def residuals(trainable, frozen, batch):
        def loss(trainable):
            return sums_fn(trainable, frozen, batch, runtime.context(batch))[0].loss

        return jax.vjp(loss, trainable)[1]

    # A parameter that the backward pass reads is among what it keeps, and takes no memory of its own.
    params = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((trainable, frozen)))
    kept = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(residuals, trainable, frozen, batch)))
    return sum(count * math.prod(shape) * dtype.itemsize for (shape, dtype), count in (kept - params).items())


def device_memory() -> int:
    """Bytes of one device; on CPU the host's memory over the number of devices that share it."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
