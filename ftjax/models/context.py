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
    """Keys and values of all layers, preallocated; row by row the slots fill from the left.

    A layer's keys enter after RoPE. `segment_ids` tells which slots hold tokens that may be attended to (0: padding,
    or not yet written); all rows of a batch write to the same slots, so that shorter prompts are padded on the left.
    """

    keys: jax.Array  # [L, B, S, K, H]
    values: jax.Array  # [L, B, S, K, H]
    segment_ids: jax.Array  # [B, S] int32
    length: jax.Array  # [] int32: slots written so far

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> "KVCache":
        shape = (layers, batch, slots, kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), jnp.int32), jnp.int32(0))

    def write(self, layer: jax.Array | int, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k and v `[B, T, K, H]` into the next T slots of a layer; `length` moves on once for all layers."""
        at = (layer, 0, self.length, 0, 0)
        return replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, k[None].astype(self.keys.dtype), at),
            values=jax.lax.dynamic_update_slice(self.values, v[None].astype(self.values.dtype), at),
        )

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, S, K, H]` of a layer, slots that are not yet written included."""
        return self.keys[layer], self.values[layer]

    def claim(self, segment_ids: jax.Array) -> "KVCache":
        """Mark the next T slots as `segment_ids [B, T]`, before the layers write them."""
        return replace(self, segment_ids=jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, self.length)))

    def advance(self, tokens: int) -> "KVCache":
        return replace(self, length=self.length + tokens)


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
