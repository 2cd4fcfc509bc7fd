"""A kernel that knows nothing of meshes, on each device's part of the batch.

Rows lie over `data` and `fsdp`, heads over `tensor`. Along `sequence` it is the tokens of a row that lie on several devices,
while attention needs them all: an all-to-all turns "all heads of some tokens" into "some heads of all tokens", the kernel runs
on whole rows, and a second all-to-all turns back (DeepSpeed Ulysses: Jacobs et al. 2023, arXiv:2309.14509).

Why not a ring of keys and values: here every kernel serves unchanged, with packing, windows, softcap and sinks; causal work is
the same on all devices, where a ring has to reorder tokens for that; and the traffic a device falls with the number of devices.
The price is that the heads have to divide by `tensor x sequence`. Key heads that are fewer are repeated until they do.

Legend: B batch, T length, N heads, K kv heads, H head dim.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ftjax.errors import UserError
from ftjax.mesh import fitting

# (q [B, T, N, H], k and v [B, T, K, H], segments [B, T], sinks [N] or None) -> [B, T, N, H]
Kernel = Callable[..., jax.Array]


def on_each_device(
    kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    """`kernel(q, k, v, segments, sinks)` under the mesh that is set; the call itself where there is none.

    Raises UserError where the mesh has a `sequence` axis by which the heads do not divide.
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
            f"mesh.sequence: {mesh.shape['sequence']} does not divide the {here} attention heads that a device has; "
            f"sizes that work: {works}"
        )
    if more := parts // math.gcd(k.shape[2], parts) - 1:
        k, v = (jnp.repeat(x, more + 1, axis=2) for x in (k, v))

    def shard(q, k, v, segments, *sinks):
        for axis in length or ():
            q, k, v = (jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
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
    # Pallas kernels do not say over which axes their results vary, which JAX would check.
    return jax.shard_map(shard, mesh=mesh, in_specs=tuple(specs), out_specs=tokens, check_vma=False)(*values)
