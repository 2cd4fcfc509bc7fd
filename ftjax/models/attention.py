"""Causal attention over packed rows. Every backend honours segment ids, windows, softcap and sinks, or refuses.

Order in a row (the slot), not the RoPE position, decides what is causal, so the same code serves packed training rows,
left-padded prompts and the KV cache.

Legend: B batch, T query length, S key length, N heads, K kv heads, G = N / K, H head dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.models.attention_blockwise import blockwise
from ftjax.models.pattern import MASKED, Pattern

__all__ = ["BACKENDS", "MASKED", "Pattern", "attend", "choose", "visible"]


def visible(q_segments: jax.Array, k_segments: jax.Array, offset: jax.Array | int, window: int | None) -> jax.Array:
    """`[B, T, S]` bool: key s is of query t's document, not after it, and inside the window.

    The query at index t sits in slot `offset + t`.
    """
    q_slot = offset + jnp.arange(q_segments.shape[1], dtype=jnp.int32)[:, None]
    k_slot = jnp.arange(k_segments.shape[1], dtype=jnp.int32)[None, :]
    mask = k_slot <= q_slot
    if window is not None:
        mask &= q_slot - k_slot < window
    return mask & (q_segments[:, :, None] == k_segments[:, None, :])


def xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    offset,
    pattern: Pattern,
    sinks: jax.Array | None = None,
    prefix: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The reference: scores in full, softmax in float32."""
    b, t, n, h = q.shape
    kv = k.shape[2]
    mask = visible(q_segments, k_segments, offset, pattern.window)
    if prefix is not None:
        before = [jnp.broadcast_to(x, (b, *x.shape)).astype(k.dtype) for x in prefix[:2]]
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
        mask = jnp.concatenate([prefix[2], mask], axis=-1)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.reshape(b, t, kv, n // kv, h)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32) * pattern.scale
    if pattern.softcap is not None:
        scores = pattern.softcap * jnp.tanh(scores / pattern.softcap)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    if sinks is not None:  # one more score in the sum, to which no value belongs
        sink = sinks.astype(jnp.float32).reshape(1, kv, n // kv, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    probabilities = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(q.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probabilities, v, precision=precision).reshape(b, t, n, h)


def _blockwise(q, k, v, q_segments, k_segments, offset, pattern: Pattern, sinks=None, prefix=None) -> jax.Array:
    """In blocks where the keys are the queries' own row; a KV cache, whose one query has few scores, goes the plain way, and
    so do rows behind a prefix."""
    if k_segments is not q_segments or prefix is not None:
        return xla(q, k, v, q_segments, k_segments, offset, pattern, sinks, prefix)
    return blockwise(q, k, v, q_segments, sinks, pattern)


BACKENDS: dict[str, Callable[..., jax.Array]] = {"xla": xla, "blockwise": _blockwise}


def choose(name: str, devices: int = 1) -> str:
    """The backend for `model.attention`; refuses one that does not exist here.

    `auto` takes `blockwise` on a single CPU device: it loops over heads, which a mesh may have spread over devices.
    """
    if name == "auto":
        return "blockwise" if devices == 1 and jax.default_backend() == "cpu" else "xla"
    if name not in BACKENDS:
        raise UserError(f"model.attention: {name!r} is not available; choose one of auto, {', '.join(sorted(BACKENDS))}")
    return name


def attend(q, k, v, q_segments, k_segments, offset, pattern: Pattern, backend: str, sinks=None, prefix=None):
    """`[B, T, N, H]`: q `[B, T, N, H]` attends to k and v `[B, S, K, H]`.

    Args:
        q_segments: [B, T] int32. A key is seen by queries of the same segment only.
        k_segments: [B, S] int32.
        offset: slot of the first query.
        pattern: scale, window and softcap of this layer.
        backend: one of BACKENDS.
        sinks: [N], a learned score of each head that takes its share of the softmax and gives nothing (gpt-oss); or None.
        prefix: keys and values [V, K, H] that stand before every document, and who sees them: bool [B, T, V]; or None.
    """
    return BACKENDS[backend](q, k, v, q_segments, k_segments, offset, pattern, sinks, prefix)
