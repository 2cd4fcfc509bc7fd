"""A cache whose keys and values are in pages that rows take as their texts grow, and that texts with the same beginning share.

Legend: B rows, T query length, G groups of rows, P pages of a group, W tokens of a page, n pages of a row's table, S = n * W,
K kv heads, D key size, V value size, l layers with the same record.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ftjax.models.nn.cache import Cache, Layout
from ftjax.models.nn.memory import KeysValues


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache(Cache):
    """Keys and values `[G, l, P, W, K, D]` in pages; states `[l, B, ...]` per row, as in `Cache`.

    Token t of a row is in slot `t % W` of page `table[row, t // W]`. Rows are in G groups of equal size, one per device that
    rows are sharded over: a page belongs to the rows of one group, so that no keys or values move between devices. Page 0 of a
    group is never written, and stands for pages that a row does not have. A page that several tables name is only read.
    """

    table: jax.Array  # [B, n] int32
    counts: jax.Array  # [B] int32: tokens of the next write that are not padding, which is not written

    @classmethod
    def pages(cls, layout: Layout, groups: int, count: int, size: int, dtype) -> tuple[tuple[jax.Array, ...], ...]:
        """Return empty pages: keys and values for each of `layout.keys_values`."""

        def arrays(size_of: Callable[[KeysValues], int]) -> tuple[jax.Array, ...]:
            shapes = ((groups, layout.size(one), count, size, one.kv_heads, size_of(one)) for one in layout.keys_values)
            return tuple(jnp.zeros(shape, dtype) for shape in shapes)

        return arrays(lambda one: one.key_dim), arrays(lambda one: one.value_dim)

    def expecting(self, counts: Int[Array, " B"]) -> "PagedCache":
        return replace(self, counts=counts)

    def of(self, rows: Int[Array, " R"], lengths: Int[Array, " R"], table: Int[Array, "R _"]) -> "PagedCache":
        """Return the cache of these rows `[R]`, in the order of their groups, with `lengths [R]` tokens so far.

        States of rows without tokens are zero. All rows' pages are still there, for `join`.
        """

        def part(whole: jax.Array) -> jax.Array:
            new = (lengths == 0).reshape(-1, *(1,) * (whole.ndim - 2))
            return jnp.where(new, 0, whole.at[:, rows].get(mode="clip"))

        return replace(self, states=tuple(map(part, self.states)), lengths=lengths, table=table)

    def join(self, rows: Int[Array, " R"], part: "PagedCache") -> "PagedCache":
        """Return the cache after these rows of it have advanced; indices past the end are dropped."""
        states = tuple(old.at[:, rows].set(new, mode="drop") for old, new in zip(self.states, part.states, strict=True))
        lengths = self.lengths.at[rows].set(part.lengths, mode="drop")
        return replace(self, keys=part.keys, values=part.values, states=states, lengths=lengths)

    def cleared(self, pages: Int[Array, "G cleared"]) -> "PagedCache":
        """Return the cache with zeros in these pages: what is not finite must not reach their next rows through a mask."""
        clear = jax.vmap(lambda slots, pages: slots.at[:, pages].set(0, mode="drop"))
        return replace(self, keys=tuple(clear(x, pages) for x in self.keys), values=tuple(clear(x, pages) for x in self.values))

    def _put(self, slots: jax.Array, place: jax.Array | int, new: jax.Array) -> jax.Array:
        groups, _, count, size, *_ = slots.shape
        length = new.shape[1]
        at = self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)
        page = jnp.take_along_axis(self.table, at // size, axis=1, mode="clip")
        page = jnp.where(jnp.arange(length) < self.counts[:, None], page, count)  # past the end: dropped

        def one(slots: jax.Array, page: Int[Array, " b"], slot: Int[Array, " b"], new: jax.Array) -> jax.Array:
            return slots.at[place, page, slot].set(new, mode="drop")

        by_group = (x.reshape(groups, -1, *x.shape[2:]) for x in (page, at % size, new.astype(slots.dtype)))
        return jax.vmap(one)(slots, *by_group)

    def _read(self, slots: jax.Array, place: jax.Array | int) -> jax.Array:
        """Return a layer's slots of all rows, `[B, S, K, D]`."""
        rows, pages = self.table.shape
        groups, _, _, size, *rest = slots.shape
        by_group = self.table.reshape(groups, -1, pages)
        found = jax.vmap(lambda slots, pages: slots.at[place, pages].get(mode="promise_in_bounds"))(slots, by_group)
        return found.reshape(rows, pages * size, *rest)
