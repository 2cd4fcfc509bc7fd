"""Blockwise attention with a custom backward pass: only the scores of one block of queries are in memory, and none are saved.

It is made for the CPU, where XLA's batched matrix products and the softmax over masked scores cost more than the arithmetic:
here every product is a plain matrix product of one key head with all query heads of its group, and keys after a block are
skipped. The backward pass recomputes probabilities from the saved log-sum-exp (Dao et al. 2022, arXiv:2205.14135).

Legend: B batch, T length, N heads, K kv heads, G = N / K, H head dim, Q queries of a block, S keys up to the block's end.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ftjax.models.nn.context import Branching
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.remat import ATTENTION

BLOCK = 256
MASKED = -1e30  # score of a masked key: finite, so that a row without any visible key does not give NaN


def blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield `(queries, keys)` per block: a slice of queries, and of the keys that any of them may see."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, stop)


def _scores(q, k, segments, rows: slice, keys: slice, pattern: Pattern):
    """Return the masked float32 scores `[G, Q, S]`, and the derivative of the softcap, or None without one."""
    g, t, h = q.shape[0], rows.stop - rows.start, q.shape[-1]
    s = _dot(q[:, rows].reshape(g * t, h), k[keys].T).reshape(g, t, -1) * pattern.scale
    slope = None
    if pattern.softcap is not None:
        tanh = jnp.tanh(s / pattern.softcap)
        s, slope = pattern.softcap * tanh, 1 - jnp.square(tanh)
    row, key = jnp.arange(rows.start, rows.stop)[:, None], jnp.arange(keys.start, keys.stop)[None, :]
    if isinstance(segments, Branching):
        mask = (key <= row) & (row < segments.ends[None, keys])
    else:
        mask = (key <= row) & (segments[rows, None] == segments[None, keys])
    if pattern.window is not None:
        mask &= row - key < pattern.window
    return jnp.where(mask, s, MASKED), slope


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _transposed(x: jax.Array) -> jax.Array:
    """Return the transpose, materialised: XLA would fold it into the matrix product, whose CPU kernel is then half as fast."""
    return jax.lax.optimization_barrier(x.T)


def _forward_head(pattern: Pattern, segments, sinks, q, k, v):
    """Run the forward pass of one key head: q `[G, T, H]`, k and v `[T, H]`, segments `[T]`, sinks `[G]` (-inf: none) ->
    output `[G, T, H]`, log-sum-exp `[G, T]`."""
    outputs, sums = [], []
    for rows, keys in blocks(q.shape[1], pattern.window):
        s, _ = _scores(q, k, segments, rows, keys, pattern)
        sink = sinks[:, None, None]
        top = jnp.maximum(jnp.max(s, axis=-1, keepdims=True), sink)
        e = jnp.exp(s - top)
        total = jnp.sum(e, axis=-1, keepdims=True) + jnp.exp(sink - top)
        o = _dot(e.reshape(-1, e.shape[-1]).astype(v.dtype), v[keys]).reshape(*e.shape[:2], -1)
        outputs.append((o / total).astype(q.dtype))
        sums.append((top + jnp.log(total))[..., 0])
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(sums, axis=1)


def _backward_head(pattern: Pattern, segments, sinks, q, o, d_o, k, v, lse):
    """Return the gradients of q `[G, T, H]`, of k and v (transposed, `[H, T]`), and of the sinks `[G]`."""
    delta = jnp.sum(o.astype(jnp.float32) * d_o.astype(jnp.float32), axis=-1)
    d_q, d_k, d_v = [], jnp.zeros(k.T.shape, jnp.float32), jnp.zeros(v.T.shape, jnp.float32)
    for rows, keys in blocks(q.shape[1], pattern.window):
        s, slope = _scores(q, k, segments, rows, keys, pattern)
        p = jnp.exp(s - lse[:, rows, None])
        flat = (-1, p.shape[-1])
        d_rows, q_rows = (x[:, rows].reshape(-1, x.shape[-1]) for x in (d_o, q))
        d_s = p * (_dot(d_rows, v[keys].T).reshape(p.shape) - delta[:, rows, None]) * pattern.scale
        if slope is not None:
            d_s = d_s * slope
        d_s, p = d_s.reshape(flat).astype(q.dtype), p.reshape(flat).astype(q.dtype)
        d_q.append(_dot(d_s, k[keys]).reshape(q.shape[0], -1, q.shape[-1]))
        d_k = d_k.at[:, keys].add(_dot(_transposed(q_rows), d_s))
        d_v = d_v.at[:, keys].add(_dot(_transposed(d_rows), p))
    d_sinks = -jnp.sum(jnp.exp(sinks[:, None] - lse) * delta, axis=1)
    return jnp.concatenate(d_q, axis=1), d_k, d_v, d_sinks


def _by_query(x: Float[Array, "B T N H"], kv: int) -> Float[Array, "B {kv} G T H"]:
    """Split the query heads by their key head."""
    b, t, n, h = x.shape
    return x.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4)


def _by_key(x: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
    return x.transpose(0, 2, 1, 3)


def _joined(x: Float[Array, "B K G T H"]) -> Float[Array, "B T K*G H"]:
    """Invert `_by_query`."""
    b, kv, g, t, h = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, t, kv * g, h)


def _each_head(
    run: Callable, segments: jax.Array | Branching, sinks: jax.Array | None, queries: tuple, keys: tuple, more: tuple = ()
):
    """Map `run(segments, sinks, *queries, *keys, *more)` over the key heads of each row.

    Rows are the outer loop, so that the inner loop gets a row's segments as an operand: XLA's CPU kernels compute the mask
    many times slower if they also have to index the row.

    Args:
        queries: arrays [B, T, N, H].
        keys: arrays [B, T, K, H].
        more: arrays [B, K, ...].
    """
    kv, heads = keys[0].shape[2], queries[0].shape[2]
    sinks = jnp.full((heads,), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    sinks = sinks.reshape(kv, heads // kv)

    def row(segments_and_heads):
        segments, heads = segments_and_heads
        return jax.lax.map(lambda head: run(segments, *head), (sinks, *heads))

    heads = (*(_by_query(x, kv) for x in queries), *(_by_key(x) for x in keys), *more)
    return jax.lax.map(row, (segments, heads))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | Branching,
    sinks: Float[Array, " N"] | None,
    pattern: Pattern,
) -> Float[Array, "B T N H"]:
    """Compute self-attention of packed rows."""
    return _forward(q, k, v, segments, sinks, pattern)[0]


def _forward(q, k, v, segments, sinks, pattern: Pattern):
    o, lse = _each_head(partial(_forward_head, pattern), segments, sinks, (q,), (k, v))
    o, lse = (checkpoint_name(x, ATTENTION) for x in (_joined(o), lse))
    return o, (q, k, v, segments, sinks, o, lse)


def _backward(pattern: Pattern, saved, d_o):
    q, k, v, segments, sinks, o, lse = saved
    run = partial(_backward_head, pattern)
    d_q, d_k, d_v, d_sinks = _each_head(run, segments, sinks, (q, o, d_o), (k, v), (lse,))
    d_k, d_v = (x.transpose(0, 3, 1, 2).astype(like.dtype) for x, like in ((d_k, k), (d_v, v)))
    d_sinks = None if sinks is None else jnp.sum(d_sinks, axis=0).reshape(-1).astype(sinks.dtype)
    return _joined(d_q).astype(q.dtype), d_k, d_v, None, d_sinks


blockwise.defvjp(_forward, _backward)
