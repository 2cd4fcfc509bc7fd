"""Rows of a table by id, where the table is cut over a mesh.

Left to itself, the partitioner may send the whole table through the mesh, between slices too, for the few rows that a batch
needs. Here ids travel, and rows: along `fsdp` and `expert`, where the columns are cut, each device looks up its columns for the
tokens of all of them, and an all-to-all turns "some columns of all tokens" into "all columns of some tokens"; along `tensor`,
where the words are cut, the device that has a word gives its row and the others zeros, and the sum is exact. Nothing crosses
`data` or `sequence` but, backward, the gradient of a table that is trained.

Legend: B batch, T length, V vocab, E embed.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ftjax.mesh import RULES, fitting, spec


def rows_of(table: jax.Array, axes: tuple[str | None, ...], ids: jax.Array, dtype) -> jax.Array:
    """`table[V, E]` at `ids[B, T]` -> `[B, T, E]` in `dtype`, under the mesh that is set.

    Args:
        axes: the table's logical axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or ids.ndim != 2:
        return jnp.take(table, ids, axis=0).astype(dtype)
    words, columns = (tuple(name for name in RULES.get(axis) or () if mesh.shape[name] > 1) for axis in axes)
    batch, length = fitting(mesh, "batch", ids.shape[0]), fitting(mesh, "length", ids.shape[1])
    if batch is None or not (words or columns):  # a batch that every device has whole: nothing to exchange
        return jnp.take(table, ids, axis=0).astype(dtype)

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        if columns:
            ids = jax.lax.all_gather(ids, columns, axis=0, tiled=True)
        if words:
            at = ids - jax.lax.axis_index(words) * table.shape[0]
            here = (at >= 0) & (at < table.shape[0])
            rows = jnp.where(here[..., None], jnp.take(table, jnp.where(here, at, 0), axis=0), 0).astype(dtype)
        else:
            rows = jnp.take(table, ids, axis=0).astype(dtype)
        if columns:
            rows = jax.lax.all_to_all(rows, columns, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(rows, RULES.get(axes[0]) or ())

    tokens = PartitionSpec(batch, length)
    out = PartitionSpec(batch, length, None)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec(axes), tokens), out_specs=out)(table, ids)
