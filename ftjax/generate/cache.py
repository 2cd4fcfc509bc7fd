"""The KV cache of a model: how a forward pass goes through it, and in which sizes things come.

Legend: B batch, T query length, S cache slots, K kv heads, H head dim, L layers, E embed.
"""

from dataclasses import replace
from typing import Any

import jax

from ftjax.mesh import constrain
from ftjax.models.cache_shape import CacheShape
from ftjax.models.context import Context, KVCache


def new_cache(shape: CacheShape, batch: int, slots: int, dtype) -> KVCache:
    """An empty cache; its rows lie along the batch axes of the mesh, its heads along `tensor`."""
    cache = KVCache.empty(shape.layers, batch, slots, shape.kv_heads, shape.head_dim, dtype)
    axes = (None, "batch", None, "kv_heads", None)
    return replace(
        cache,
        keys=constrain(cache.keys, *axes),
        values=constrain(cache.values, *axes),
        segment_ids=constrain(cache.segment_ids, "batch", None),
    )


def forward(module: Any, tokens: jax.Array, ctx: Context, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """`(hidden states [B, T, E], cache)`: the next T tokens of every row.

    The one place that moves a cache on; families only write and read it.
    """
    hidden, cache, _ = module.hidden(tokens, ctx, cache.claim(ctx.segment_ids))
    return hidden, cache.advance(tokens.shape[1])


def bucket(size: int, smallest: int = 1) -> int:
    """`size` rounded up to a quarter of a power of two (32, 40, 48, 56, 64, 80 ...): at most a fifth is wasted, and few
    shapes are ever compiled."""
    if size <= smallest:
        return smallest
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step
