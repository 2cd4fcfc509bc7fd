"""Embedding lookup in a sharded table.

By default the partitioner may send the whole table through the mesh, even between slices, for the few rows that a batch needs.
Here only ids and rows are transferred. Along `fsdp` and `expert`, which shard the columns, each device looks up its columns for
the tokens of all of them, and an all-to-all exchanges "some columns of all tokens" for "all columns of some tokens". Along
`tensor`, which shards the vocabulary, the device that has a token's row contributes it and the others zeros, so the sum is
exact. Nothing crosses `data` or `sequence`, except the gradient of a trained table in the backward pass.

Legend: B batch, T length, V vocab, E embed.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ftjax.mesh import RULES, fitting, spec
from ftjax.models.nn.bfloat16 import rows_at


def rows_of(table: Float[Array, "V E"], axes: tuple[str | None, ...], ids: Int[Array, "*of"], dtype) -> Float[Array, "*of E"]:
    """Look up ids in a table under the current mesh; return rows in `dtype`.

    Args:
        axes: logical axes of the table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or ids.ndim != 2:
        return rows_at(table, ids).astype(dtype)
    words, columns = (tuple(name for name in RULES.get(axis) or () if mesh.shape[name] > 1) for axis in axes)
    batch, length = fitting(mesh, "batch", ids.shape[0]), fitting(mesh, "length", ids.shape[1])
    if batch is None or not (words or columns):  # the batch or the table is replicated: nothing to exchange
        return rows_at(table, ids).astype(dtype)

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        if columns:
            ids = jax.lax.all_gather(ids, columns, axis=0, tiled=True)
        if words:
            at = ids - jax.lax.axis_index(words) * table.shape[0]
            here = (at >= 0) & (at < table.shape[0])
            rows = jnp.where(here[..., None], rows_at(table, jnp.where(here, at, 0)), 0).astype(dtype)
        else:
            rows = rows_at(table, ids).astype(dtype)
        if columns:
            rows = jax.lax.all_to_all(rows, columns, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(rows, RULES.get(axes[0]) or ())

    tokens = PartitionSpec(batch, length)
    out = PartitionSpec(batch, length, None)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec(axes), tokens), out_specs=out)(table, ids)
