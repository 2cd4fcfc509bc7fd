"""Self-attention shared by all families: RoPE, the KV cache and the attention backend.

Legend: B batch, T query length, N heads, K kv heads, D key size, V value size; H head dim, if the two are equal.
"""

import jax
import jax.numpy as jnp

from ftjax.mesh import constrain
from ftjax.models.attention import Pattern, attend
from ftjax.models.cache import Memories
from ftjax.models.context import Context
from ftjax.models.rope import apply


def self_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    ctx: Context,
    pattern: Pattern,
    layer,
    cache: Memories,
    sinks: jax.Array | None = None,
    name: str = "",
) -> tuple[jax.Array, Memories]:
    """Compute attention of q `[B, T, N, D]` over the cache and the tokens' k `[B, T, K, D]` and v `[B, T, K, V]`.

    Returns `([B, T, N V], cache)`. Queries and keys are rotated here unless `ctx.rope` is None, in layers without RoPE.

    Args:
        k, v: None in a layer that shares those of the last layer that wrote under `name` (`ftjax.models.memory`).
    """
    b, t = q.shape[:2]
    if ctx.rope is not None:
        q, k = apply(q, *ctx.rope), None if k is None else apply(k, *ctx.rope)
    q = constrain(q, "batch", "length", "heads", None)
    segments, offset = ctx.segment_ids, 0
    if cache is not None:
        if k is None:
            k, v = cache.shared(layer, name)
        else:
            cache, k, v = cache.write(layer, k, v, name)
        if cache.lengths is not None:  # a row that decodes is one document
            segments, offset = None, cache.lengths
    y = attend(q, k, v, ctx.segment_ids, segments, offset, pattern, ctx.attention, sinks, _before(ctx, pattern, layer))
    return y.reshape(b, t, -1), cache


def _before(ctx: Context, pattern: Pattern, layer) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """Return this layer's virtual tokens `[V, K, H]`, and a mask of the tokens whose window reaches them, or None."""
    if ctx.prefix is None:
        return None
    keys, values = ctx.prefix.keys[layer], ctx.prefix.values[layer]
    distance = ctx.positions[:, :, None] - jnp.arange(keys.shape[0], dtype=jnp.int32)
    seen = jnp.ones(distance.shape, bool) if pattern.window is None else distance < pattern.window
    return keys, values, seen
