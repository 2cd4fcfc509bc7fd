"""A cache whose keys and values are in pages that rows take as their texts grow, and that texts with the same beginning share.

Legend: B rows, T query length, G groups of rows, P pages of a group, W tokens of a page, n pages of a row's table, S = n * W,
K kv heads, D key size, V value size, l layers with the same record.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.models.nn.attention_paged import PageKernel, in_pages, join, lanes, part
from ftjax.models.nn.attention_streamed import streamed
from ftjax.models.nn.cache import Cache, Layout, replaced
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.memory import KeysValues


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache(Cache):
    """Keys and values `[G, l, P, W, K, D]` in pages; states `[l, B, ...]` per row, as in `Cache`.

    Token t of a row is in slot `t % W` of page `table[row, t // W]`. Rows are in G groups of equal size, one per device that
    rows are sharded over: a page belongs to the rows of one group, so that no keys or values move between devices. Page 0 of a
    group is never written, and stands for pages that a row does not have. A page that several tables name is only read.

    With a kernel, `keys` has both keys and values of a record that it takes (`ftjax.models.nn.attention_paged`), and `values`
    has None there.
    """

    table: jax.Array  # [B, n] int32
    counts: jax.Array  # [B] int32: tokens of the next write that are not padding, which is not written
    kernel: PageKernel | None = field(default=None, metadata={"static": True})

    @classmethod
    def pages(
        cls, layout: Layout, groups: int, count: int, size: int, dtype, kernel: PageKernel | None = None
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]]:
        """Return empty pages: keys and values for each of `layout.keys_values`."""

        def arrays(one: KeysValues) -> tuple[jax.Array, jax.Array | None]:
            first = groups, layout.size(one), count, size
            if kernel is not None and kernel.takes(one, size, dtype):
                return jnp.zeros((*first, 2 * one.kv_heads, lanes(one.key_dim)), dtype), None
            return tuple(jnp.zeros((*first, one.kv_heads, dim), dtype) for dim in (one.key_dim, one.value_dim))

        keys, values = zip(*map(arrays, layout.keys_values), strict=True) if layout.keys_values else ((), ())
        return keys, values

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
        keys, values = jax.tree.map(lambda slots: clear(slots, pages), (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def attends(self, record: KeysValues, pattern: Pattern, sinks: bool, prefix: bool) -> bool:
        """Return whether `attend` can compute the attention of such a layer."""
        group = self.layout.keys_values.index(record)
        return self.values[group] is None and self.kernel.attends(pattern, sinks, prefix)

    def attend(
        self, layer: jax.Array | int, record: KeysValues, q: Float[Array, "B T N H"], pattern: Pattern
    ) -> Float[Array, "B T N H"]:
        """Compute attention of the tokens that the layer has just written."""
        group, place = self._find(layer, record)
        return in_pages(q, self.keys[group], place, self.table, self.lengths, self.counts, pattern)

    def stream(
        self, layer: jax.Array | int, record: KeysValues, q: Float[Array, "B T N H"], pattern: Pattern,
        sinks: Float[Array, " N"] | None, prefix: tuple[jax.Array, ...] | None,
    ) -> Float[Array, "B T N V"]:  # fmt: skip
        """Compute the same block by block, on one CPU."""
        group, place = self._find(layer, record)
        keys, values = self.keys[group][0], self.values[group][0]
        return streamed(q, keys, values, place, self.table, self.lengths, self.counts, pattern, sinks, prefix)

    def put(
        self, layer: jax.Array | int, k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], name: str = ""
    ) -> "PagedCache":
        group, place = self._find(layer, KeysValues(*k.shape[2:], v.shape[-1], name))
        if self.values[group] is not None:
            return super().put(layer, k, v, name)
        return replace(self, keys=replaced(self.keys, group, self._put(self.keys[group], place, join(k, v))))

    def slots(self, layer: jax.Array | int, record: KeysValues) -> tuple[Float[Array, "B S K D"], Float[Array, "B S K V"]]:
        group, place = self._find(layer, record)
        if self.values[group] is not None:
            return super().slots(layer, record)
        return part(self._read(self.keys[group], place), record.key_dim)

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
