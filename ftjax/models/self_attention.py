"""What the self-attention of all families shares: rotary positions, the KV cache, scores.

Legend: B batch, T query length, N heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp

from ftjax.mesh import constrain
from ftjax.models.attention import Pattern, attend
from ftjax.models.context import Context, KVCache
from ftjax.models.rope import apply


def self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ctx: Context,
    pattern: Pattern,
    layer,
    cache: KVCache | None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """q `[B, T, N, H]`, k and v `[B, T, K, H]` of the tokens at hand -> `([B, T, N H], cache)`.

    Queries and keys are rotated here, unless `ctx.rope` is None: a layer, or a model, that has no rotary positions.
    """
    b, t, n, h = q.shape
    if ctx.rope is not None:
        q, k = apply(q, *ctx.rope), apply(k, *ctx.rope)
    q = constrain(q, "batch", "length", "heads", None)
    segments, offset = ctx.segment_ids, 0
    if cache is not None:
        cache = cache.write(layer, k, v)
        (k, v), segments, offset = cache.read(layer), None, cache.lengths
    y = attend(q, k, v, ctx.segment_ids, segments, offset, pattern, ctx.attention, sinks, _before(ctx, pattern, layer))
    return y.reshape(b, t, n * h), cache


def _before(ctx: Context, pattern: Pattern, layer) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """This layer's virtual tokens `[V, K, H]`, and which tokens see them: all whose window reaches back so far."""
    if ctx.prefix is None:
        return None
    keys, values = ctx.prefix.keys[layer], ctx.prefix.values[layer]
    distance = ctx.positions[:, :, None] - jnp.arange(keys.shape[0], dtype=jnp.int32)
    seen = jnp.ones(distance.shape, bool) if pattern.window is None else distance < pattern.window
    return keys, values, seen
