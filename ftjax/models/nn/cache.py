"""Caches that hold the memory of a model's layers (`ftjax.models.nn.memory`), for decoding and for passes over whole rows.

Legend: B batch, T queries, S slots, K kv heads, D key size, V value size, l layers with the same record.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ftjax.models.nn.memory import KeysValues, Memory, Shared, State


@dataclass(frozen=True)
class Layout:
    """The arrays of a cache, one per distinct record, and the index of each layer in them."""

    layers: tuple[tuple[Memory, ...], ...]

    @cached_property
    def groups(self) -> dict[KeysValues | State, dict[int, int]]:
        """For each record, the layers that use it and their indices in its array."""
        found: dict[KeysValues | State, dict[int, int]] = {}
        last: dict[str, KeysValues] = {}
        for layer, records in enumerate(self.layers):
            for record in records:
                if isinstance(record, Shared):
                    assert record.name in last, f"layer {layer} shares keys that no layer before it has: {record}"
                    source = found[last[record.name]]
                    source[layer] = max(source.values())
                    continue
                places = found.setdefault(record, {})
                assert layer not in places, f"layer {layer} has two of one record, which names would tell apart: {record}"
                places[layer] = max(places.values(), default=-1) + 1
                if isinstance(record, KeysValues):
                    last[record.name] = record
        return found

    @cached_property
    def keys_values(self) -> tuple[KeysValues, ...]:
        return tuple(record for record in self.groups if isinstance(record, KeysValues))

    @cached_property
    def states(self) -> tuple[State, ...]:
        return tuple(record for record in self.groups if not isinstance(record, KeysValues))

    def size(self, record: KeysValues | State) -> int:
        """Return the number of layers in the record's array."""
        return max(self.groups[record].values()) + 1

    def place(self, record: KeysValues | State, layer: jax.Array | int) -> jax.Array | int:
        """Return a layer's index in the record's array; the layer number may be traced."""
        assert record in self.groups, f"layer {layer} uses what no layer has declared: {record}"
        places = self.groups[record]
        if all(layer == place for layer, place in places.items()):
            return layer
        if isinstance(layer, int):
            return places[layer]
        return jnp.asarray([places.get(number, 0) for number in range(len(self.layers))], jnp.int32)[layer]

    def named(self, name: str) -> KeysValues:
        """Return the record of the keys and values that layers share under this name."""
        found = [record for record in self.keys_values if record.name == name]
        assert len(found) == 1, f"keys and values that are shared have one size, and those named {name!r} have more: {found}"
        return found[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Preallocated memory of all layers for decoding. Each row fills its slots from the left, at its own pace.

    Token t of a row is in slot t, independent of other rows, and keys are stored after RoPE. A query attends to the slots up to
    its own. Later slots may hold any finite values, from padding or from an earlier text; they are overwritten before a query
    can see them. A state is the one after exactly the row's tokens; padding does not change it.
    """

    keys: tuple[jax.Array, ...]  # [l, B, S, K, D] for each of `layout.keys_values`
    values: tuple[jax.Array, ...]  # [l, B, S, K, V]
    states: tuple[jax.Array, ...]  # [l, B, ...] for each of `layout.states`
    lengths: jax.Array  # [B] int32: tokens of each row so far
    layout: Layout = field(metadata={"static": True})

    @classmethod
    def empty(cls, layout: Layout, batch: int, slots: int, dtype) -> "Cache":
        def arrays(records: tuple, shape_of) -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros((layout.size(one), batch, *shape_of(one)), dtype) for one in records)

        keys = arrays(layout.keys_values, lambda one: (slots, one.kv_heads, one.key_dim))
        values = arrays(layout.keys_values, lambda one: (slots, one.kv_heads, one.value_dim))
        states = tuple(
            jnp.zeros((layout.size(one), batch, *one.shape), dtype if one.dtype is None else one.dtype) for one in layout.states
        )
        return cls(keys, values, states, jnp.zeros(batch, jnp.int32), layout)

    # ---- called by layers ----

    def write(
        self, layer: jax.Array | int, k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], name: str = ""
    ) -> tuple["Cache", Float[Array, "B S K D"], Float[Array, "B S K V"]]:
        """Write keys and values to the next T slots of each row of a layer.

        Returns the cache, and the layer's keys and values, including unwritten slots. The row lengths do not
        change; `advance` updates them once for all layers.
        """
        cache, record = self.put(layer, k, v, name), KeysValues(*k.shape[2:], v.shape[-1], name)
        return cache, *cache.slots(layer, record)

    def shared(self, layer: jax.Array | int, name: str = "") -> tuple[Float[Array, "B S K D"], Float[Array, "B S K V"]]:
        """Return the keys and values that the last layer before this one wrote under this name."""
        return self.slots(layer, self.layout.named(name))

    def put(self, layer: jax.Array | int, k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], name: str = "") -> "Cache":
        """Write as `write` does, and return the cache alone."""
        group, place = self._find(layer, KeysValues(*k.shape[2:], v.shape[-1], name))
        keys, values = self._put(self.keys[group], place, k), self._put(self.values[group], place, v)
        return replace(self, keys=replaced(self.keys, group, keys), values=replaced(self.values, group, values))

    def slots(self, layer: jax.Array | int, record: KeysValues) -> tuple[Float[Array, "B S K D"], Float[Array, "B S K V"]]:
        """Return the keys and values of a layer, including unwritten slots."""
        group, place = self._find(layer, record)
        return self._read(self.keys[group], place), self._read(self.values[group], place)

    def _find(self, layer: jax.Array | int, record: KeysValues) -> tuple[int, jax.Array | int]:
        """Return the index of the record's arrays in `keys` and `values`, and that of the layer in these."""
        return self.layout.keys_values.index(record), self.layout.place(record, layer)

    def state(self, layer: jax.Array | int, record: State) -> Float[Array, "B ..."]:
        """Return the state of a layer."""
        return self.states[self.layout.states.index(record)][self.layout.place(record, layer)]

    def with_state(self, layer: jax.Array | int, record: State, new: Float[Array, "B ..."]) -> "Cache":
        """Return the cache with another state of a layer."""
        group, place = self.layout.states.index(record), self.layout.place(record, layer)
        whole = self.states[group]
        changed = jax.lax.dynamic_update_index_in_dim(whole, new.astype(whole.dtype), place, axis=0)
        return replace(self, states=replaced(self.states, group, changed))

    def _put(self, slots: jax.Array, place: jax.Array | int, new: jax.Array) -> jax.Array:
        """Scatter one window per row, with rows as a batch dimension, so that a sharded cache is written in place.

        A window that does not fit is dropped: it belongs to a row that has ended.
        """
        at = jnp.stack([jnp.broadcast_to(jnp.int32(place), self.lengths.shape), self.lengths], axis=1)
        dimensions = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0, 2),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )
        return jax.lax.scatter(
            slots, at, new.astype(slots.dtype), dimensions, indices_are_sorted=True, unique_indices=True,
            mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        )  # fmt: skip

    def _read(self, slots: jax.Array, place: jax.Array | int) -> jax.Array:
        return slots[place]

    # ---- called by decoding ----

    def expecting(self, counts: Int32[Array, " B"]) -> "Cache":
        """Return the cache for a step that writes `counts` valid tokens, and padding after them."""
        return self

    def advance(self, counts: Int32[Array, " B"]) -> "Cache":
        """Advance the row lengths by `counts`, the number of valid tokens in the last write."""
        return replace(self, lengths=self.lengths + counts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Handed:
    """Keys and values that layers pass on to later layers (`Shared`) in a pass over whole rows."""

    last: dict[str, tuple[jax.Array, jax.Array]]  # by name, k [B, T, K, D] and v [B, T, K, V]

    lengths: ClassVar[None] = None

    @classmethod
    def start(cls, layers: tuple[tuple[Memory, ...], ...], batch: int, length: int, dtype) -> "Handed | None":
        """Return an instance with zeros for every shared name, or None if no layer shares keys and values."""
        names = {record.name for own in layers for record in own if isinstance(record, Shared)}
        if not names:
            return None
        layout = Layout(layers)

        def zeros(name: str) -> tuple[jax.Array, jax.Array]:
            own = layout.named(name)
            return tuple(jnp.zeros((batch, length, own.kv_heads, size), dtype) for size in (own.key_dim, own.value_dim))

        return cls({name: zeros(name) for name in sorted(names)})

    def write(
        self, layer: jax.Array | int, k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], name: str = ""
    ) -> tuple["Handed", Float[Array, "B T K D"], Float[Array, "B T K V"]]:
        """Return the layer's own keys and values, and store them for later layers if the name is shared."""
        if name not in self.last:
            return self, k, v
        dtype = self.last[name][0].dtype
        return Handed({**self.last, name: (k.astype(dtype), v.astype(dtype))}), k, v

    def shared(self, layer: jax.Array | int, name: str = "") -> tuple[Float[Array, "B T K D"], Float[Array, "B T K V"]]:
        return self.last[name]


Memories = Cache | Handed | None  # carried through the layers; None if there is nothing to remember


def recall(cache: Memories, layer: jax.Array | int, record: State, batch: int, dtype) -> Float[Array, "B ..."]:
    """Return a layer's state from the cache, or the zeros that a whole row starts with."""
    if isinstance(cache, Cache):
        return cache.state(layer, record)
    return jnp.zeros((batch, *record.shape), dtype if record.dtype is None else record.dtype)


def remember(cache: Memories, layer: jax.Array | int, record: State, new: Float[Array, "B ..."]) -> Memories:
    """Store a layer's state after the current tokens, if there is a decoding cache."""
    return cache.with_state(layer, record, new) if isinstance(cache, Cache) else cache


def replaced(arrays: tuple, number: int, new: jax.Array) -> tuple:
    return (*arrays[:number], new, *arrays[number + 1 :])
