"""The KV cache of a model: how a forward pass goes through it, and in which sizes things come.

Legend: B batch, T query length, S cache slots, K kv heads, H head dim, L layers, E embed.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.mesh import constrain
from ftjax.models.cache_shape import CacheShape
from ftjax.models.context import Context, KVCache


def new_cache(shape: CacheShape, batch: int, slots: int, dtype) -> KVCache:
    """An empty cache, its rows sharded over the batch axes of the mesh, its heads over `tensor`."""
    cache = KVCache.empty(shape.layers, batch, slots, shape.kv_heads, shape.head_dim, dtype)
    axes = (None, "batch", None, "kv_heads", None)
    return replace(
        cache,
        keys=constrain(cache.keys, *axes),
        values=constrain(cache.values, *axes),
        lengths=constrain(cache.lengths, "batch"),
    )


def forward(module: Any, tokens: jax.Array, counts: jax.Array, cache: KVCache, dtype: Any) -> tuple[jax.Array, KVCache]:
    """`(hidden states [B, T, E], cache)` of each row's next tokens `[B, T]`, of which the first `counts [B]` are not padding.

    The one place that advances a cache; families only write and read it.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    # Padding stays within the positions that exist: NaN from a position that a model has not learned would stay in its slot.
    positions = jnp.maximum(cache.lengths[:, None] + jnp.minimum(index, counts[:, None] - 1), 0)
    ctx = Context(positions, (index < counts[:, None]).astype(jnp.int32), dtype)
    hidden, cache, _ = module.hidden(tokens, ctx, cache)
    return hidden, cache.advance(counts)


def bucket(size: int, smallest: int = 1) -> int:
    """`size` rounded up to a quarter of a power of two (32, 40, 48, 56, 64, 80 ...): at most a fifth is wasted, and few
    shapes are ever compiled."""
    if size <= smallest:
        return smallest
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step
