"""`model.remat: auto`: keep the results of matrix products if they fit in memory, recompute them otherwise.

`none` is never chosen: to write out the elementwise values of a layer and read them again costs more than to recompute them
where they are used (1.2 times the time of a step on a CPU, and twice the memory; docs/performance.md).
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import jax

from ftjax.data.batch import batch_arrays
from ftjax.models.nn.param import Spec
from ftjax.train.step import LossFn, Runtime

SHARE = 0.5  # share of the device's memory for activations


def choose_remat(
    loss_fn: LossFn, runtime: Runtime, trainable: Mapping[str, Spec], frozen: Mapping[str, Spec], shape: tuple[int, int],
    memory: int, values: int = 0,
) -> str:  # fmt: skip
    """Return the configured policy; for `auto` the first of `dots`, `attention` and `full` whose saved activations fit.

    They are in order of speed. The size is exact: the bytes that the backward pass of one device's microbatch keeps, computed
    from shapes alone; for this the loss is traced, unless a bound that needs no trace fits already.

    Args:
        trainable: specs of the trained parameters by path, with the dtypes in which they are held.
        frozen: specs of the frozen parameters.
        shape: rows and tokens of a microbatch on one device.
        memory: bytes of the device.
        values: values of a document besides its tokens (`batch_arrays`).
    """
    if runtime.remat != "auto":
        return runtime.remat
    budget = SHARE * memory
    if most_bytes([*trainable.values(), *frozen.values()], math.prod(shape)) < budget:
        return "dots"
    return next(
        (
            policy
            for policy in ("dots", "attention")
            if saved_bytes(loss_fn, runtime, trainable, frozen, policy, shape, values) < budget
        ),
        "full",
    )


def most_bytes(specs: Sequence[Spec], tokens: int) -> int:
    """Return at least the bytes that `dots` saves: for each matrix, experts that are not chosen too, its outputs and its inputs
    in float32, twice, because an adapter's layer saves its base's outputs and the sum."""
    widths = [math.prod(spec.shape[:-2]) * max(spec.shape[-2:]) for spec in specs if len(spec.shape) > len(spec.stacked) + 1]
    return 2 * 4 * tokens * sum(widths)


def saved_bytes(
    loss_fn: LossFn, runtime: Runtime, trainable: Mapping[str, Spec], frozen: Mapping[str, Spec], policy: str,
    shape: tuple[int, int], values: int = 0,
) -> int:  # fmt: skip
    """Return the bytes that the forward pass saves for the backward pass, beyond the parameters themselves."""
    trainable, frozen = ({path: spec.abstract for path, spec in specs.items()} for specs in (trainable, frozen))
    rows, length = shape
    batch = {name: jax.ShapeDtypeStruct((rows, length * one.width), one.dtype) for name, one in batch_arrays(values).items()}
    runtime = Runtime(runtime.dtype, runtime.attention, policy)

    def residuals(trainable, frozen, batch):
        def loss(trainable):
            return loss_fn(trainable, frozen, batch, runtime.context(batch))[0].loss

        return jax.vjp(loss, trainable)[1]

    # The residuals include parameters that the backward pass reads; these take no memory of their own.
    params = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((trainable, frozen)))
    kept = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(residuals, trainable, frozen, batch)))
    return sum(count * math.prod(shape) * dtype.itemsize for (shape, dtype), count in (kept - params).items())


def device_memory(devices: Sequence[jax.Device]) -> int:
    """Return the bytes of one of the devices; on CPU the host's memory divided by the number of them that share it."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    stats = here[0].memory_stats() if here[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(here)
