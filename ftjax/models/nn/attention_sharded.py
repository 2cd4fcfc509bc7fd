"""Run a single-device attention kernel on each device's shard of the batch.

Rows are sharded along `data` and `fsdp`, heads along `tensor`. Along `sequence` the tokens of a row are sharded, but attention
needs all of them: an all-to-all exchanges "all heads of some tokens" for "some heads of all tokens", the kernel runs on whole
rows, and a second all-to-all reverts the exchange (DeepSpeed Ulysses: Jacobs et al. 2023, arXiv:2309.14509).

Compared with ring attention, every kernel works unchanged, with packing, windows, softcap and sinks; causal work is balanced
across devices without reordering tokens; and the traffic per device falls with the number of devices. In return, the number of
heads must be divisible by `tensor x sequence`. If there are fewer key heads, they are repeated until they are.

Legend: B batch, T length, N heads, K kv heads, H head dim.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ftjax.errors import UserError
from ftjax.mesh import fitting
from ftjax.models.nn.context import Branching
from ftjax.models.nn.in_turn import in_turn

# (q [B, T, N, H], k and v [B, T, K, H], segments [B, T], sinks [N] or None) -> [B, T, N, H]
Kernel = Callable[..., jax.Array]


def on_each_device(
    kernel: Kernel,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | Branching,
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "B T N H"]:
    """Run `kernel(q, k, v, segments, sinks)` on each device's shard under the current mesh; call it directly without a mesh.

    Raises UserError if the number of heads is not divisible by the mesh's `sequence` axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segments, sinks)
    b, t, n, _ = q.shape
    rows, heads, length = fitting(mesh, "batch", b), fitting(mesh, "heads", n), fitting(mesh, "length", t)
    parts = math.prod(mesh.shape[axis] for axis in (*(heads or ()), *(length or ())))
    if n % parts:
        here = n // math.prod(mesh.shape[axis] for axis in heads or ())
        works = ", ".join(str(size) for size in range(1, here + 1) if here % size == 0)
        raise UserError(
            f"mesh.sequence: {mesh.shape['sequence']} does not divide the {here} attention heads of a device; "
            f"choose one of {works}"
        )
    if more := parts // math.gcd(k.shape[2], parts) - 1:
        k, v = (jnp.repeat(x, more + 1, axis=2) for x in (k, v))

    def shard(q, k, v, segments, *sinks):
        for axis in length or ():
            exchange = partial(jax.lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True)
            q, k, v = in_turn(exchange, q, k, v)
        y = kernel(q, k, v, segments, *(sinks or (None,)))
        for axis in length or ():
            y = jax.lax.all_to_all(y, axis, split_axis=1, concat_axis=2, tiled=True)
        return y

    tokens = PartitionSpec(rows, length, heads, None)
    specs = [tokens, tokens, tokens, PartitionSpec(rows, None)]
    values = [q, k, v, segments]
    if sinks is not None:
        specs.append(PartitionSpec((*(heads or ()), *(length or ()))))
        values.append(sinks)
    # check_vma=False: Pallas kernels do not declare over which mesh axes their results vary.
    return jax.shard_map(shard, mesh=mesh, in_specs=tuple(specs), out_specs=tokens, check_vma=False)(*values)
