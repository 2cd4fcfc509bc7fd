"""What every layer of one forward pass may need to know, and the KV cache.

Legend: B batch, T query length, S cache slots, K kv heads, H head dim, L layers, V virtual tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, preallocated. Each row fills its slots from the left, at its own pace.

    Token t of a row is in slot t, whatever its neighbours hold, and its keys enter after RoPE. A query sees the slots up to its
    own. Later slots may hold anything finite: padding of a prompt, or what an earlier text left; each is overwritten before a
    query can see it.
    """

    keys: jax.Array  # [L, B, S, K, H]
    values: jax.Array  # [L, B, S, K, H]
    lengths: jax.Array  # [B] int32: tokens of each row so far

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> "KVCache":
        shape = (layers, batch, slots, kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def write(self, layer: jax.Array | int, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k and v `[B, T, K, H]` into the next T slots of each row of a layer; `advance` moves on, once for all layers."""
        return replace(self, keys=self._put(self.keys, layer, k), values=self._put(self.values, layer, v))

    def _put(self, slots: jax.Array, layer: jax.Array | int, new: jax.Array) -> jax.Array:
        """One window of each row: with the rows as a batch dimension, a sharded cache is written where it is. A window that
        does not fit is dropped: it is that of a row that has ended."""
        at = jnp.stack([jnp.broadcast_to(jnp.int32(layer), self.lengths.shape), self.lengths], axis=1)
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

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, S, K, H]` of a layer, slots that are not yet written included."""
        return self.keys[layer], self.values[layer]

    def advance(self, counts: jax.Array) -> "KVCache":
        """Keep the first `counts [B]` tokens of each row that were written last."""
        return replace(self, lengths=self.lengths + counts)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of virtual tokens before every document; keys as they are after RoPE, at positions 0 to V - 1."""

    keys: jax.Array  # [L, V, K, H]
    values: jax.Array  # [L, V, K, H]


@dataclass(frozen=True)
class Context:
    """One forward pass, as its layers see it.

    Attributes:
        positions: [B, T] int32, the RoPE position of each token; they restart with each document.
        segment_ids: [B, T] int32, the document of each token in its row; 0 is padding.
        dtype: of activations and matrix products.
        attention: the attention backend (`ftjax.models.attention.choose`).
        remat: what a block keeps for its backward pass (`ftjax.models.stack.REMAT_POLICIES`), or `none` to keep all.
        dropout: key of this layer's dropout masks; None outside of training.
        rope: what the family's position embedding prepared once for all layers.
        prefix: what every document can see before itself (`ftjax.models.virtual`); or None.
        whole_weights: weights have been gathered already (`ftjax.models.chunks`).
    """

    positions: jax.Array
    segment_ids: jax.Array
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    dropout: jax.Array | None = None
    rope: Any = None
    prefix: Prefix | None = None
    whole_weights: bool = False
