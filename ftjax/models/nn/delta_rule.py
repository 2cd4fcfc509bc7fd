"""The gated delta rule: linear attention whose state forgets, and overwrites what it holds under a key.

For one head, with a state `S [D, V]`, a decay `exp(g)` and a strength `beta`:

    S = exp(g) S;  S = S + k (beta (v - S^T k))^T;  y = S^T q

`gated_delta_rule` computes it for chunks of C tokens with matrix products: within a chunk, the corrections of all tokens solve
a unit triangular system, and only the state goes from chunk to chunk. Everything is computed in float32.

Sources: Yang et al. 2024, "Gated Delta Networks" (arXiv:2412.06464) and "Parallelizing Linear Transformers with the Delta Rule"
(arXiv:2406.06484, the chunked form); transformers, models/qwen3_5 (`torch_chunk_gated_delta_rule`), for the normalisation.

Legend: B batch, T length, K key heads, R value heads per key head, N = K R, D key size, V value size, C tokens of a chunk,
c chunks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from ftjax.models.nn.decays import CHUNK, chunk_length, chunked, decays

_product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def gated_delta_rule(
    q: Float[Array, "B T K D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    state: Float[Array, "B N D V"],
    segment_ids: Int[Array, "B T"],
    chunk: int = CHUNK,
) -> tuple[Float32[Array, "B T N V"], Float32[Array, "B N D V"]]:
    """Return the outputs, and the state after the last token that is not padding.

    The state is zero at the start of each document (`ftjax.models.nn.recurrence`): no product has a term of two documents.

    Args:
        q, k: each key head serves R consecutive value heads. Both are normalised here.
        g: the logarithm of the decay, at most 0.
        state: before the first token.
        segment_ids: the document of each token; 0 is padding, whose output has no meaning.
        chunk: C, a power of two.
    """
    q, k, v, g, beta, state = (x.astype(jnp.float32) for x in (q, k, v, g, beta, state))
    q, k = normalised(q) * q.shape[-1] ** -0.5, normalised(k)
    real = (segment_ids != 0)[..., None]
    g, beta = jnp.where(real, g, 0), jnp.where(real, beta, 0)  # padding neither forgets nor writes
    if q.shape[1] == 1:
        return _one_token(q, k, v, g, beta, state)
    return _in_chunks(q, k, v, g, beta, state, segment_ids, chunk)


def normalised(x: Float[Array, "*of D"]) -> Float[Array, "*of D"]:
    """Return `x / |x|` along the last axis, with the epsilon of transformers."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _one_token(q, k, v, g, beta, state) -> tuple[jax.Array, jax.Array]:
    repeats = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(x[:, 0], repeats, axis=1) for x in (q, k))  # [B, N, D]
    state = state * jnp.exp(g[:, 0])[..., None, None]
    correction = beta[:, 0, :, None] * (v[:, 0] - _product("bndv,bnd->bnv", state, k))
    state = state + k[..., None] * correction[..., None, :]
    return _product("bndv,bnd->bnv", state, q)[:, None], state


def _in_chunks(q, k, v, g, beta, state, segment_ids, chunk: int) -> tuple[jax.Array, jax.Array]:
    (b, t, heads, size), n = k.shape, v.shape[2]
    chunk = chunk_length(t, chunk)
    q, k = chunked(q, chunk, -2), chunked(k, chunk, -2)  # [c, B, K, C, D]
    v = chunked(v.reshape(b, t, heads, n // heads, -1), chunk, -2)  # [c, B, K, R, C, V]
    g, beta = (x.reshape(b, t, heads, n // heads) for x in (g, beta))
    between, enter, leave, kept = decays(g, segment_ids, chunk)
    beta = chunked(beta, chunk, -1)  # [c, B, K, R, C]

    # A token writes its own value less what is held under its key, by tokens of the chunk before it and by the state.
    system = jnp.tril(_product("cbkid,cbkjd->cbkij", k, k), -1)[:, :, :, None] * between * beta[..., None]
    solved = unit_lower_inverse(system)
    own = _product("cbkrij,cbkrjv->cbkriv", solved * beta[..., None, :], v)
    held = _product("cbkrij,cbkjd->cbkrid", solved * (beta * enter)[..., None, :], k)
    asked = q[:, :, :, None] * enter[..., None]
    reads = jnp.concatenate([held, asked], axis=-2)
    keys = k[:, :, :, None] * leave[..., None]

    def next_chunk(state: jax.Array, of_chunk: tuple) -> tuple[jax.Array, tuple]:
        reads, own, keys, kept = of_chunk
        found = _product("bkrid,bkrdv->bkriv", reads, state)
        written = own - found[..., :chunk, :]
        state = kept[..., None, None] * state + _product("bkrid,bkriv->bkrdv", keys, written)
        return state, (written, found[..., chunk:, :])

    state, (written, y) = jax.lax.scan(next_chunk, state.reshape(b, heads, n // heads, size, -1), (reads, own, keys, kept))
    weights = _product("cbkid,cbkjd->cbkij", q, k)[:, :, :, None] * between
    y = y + _product("cbkrij,cbkrjv->cbkriv", weights, written)
    y = jnp.moveaxis(y, (0, -2), (1, 2)).reshape(b, -1, n, v.shape[-1])[:, :t]
    return y, state.reshape(b, n, size, -1)


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "*of C C"]) -> Float[Array, "*of C C"]:
    """Return `(I + a)^-1` of strictly lower triangular matrices, C a power of two.

    Inverses of diagonal blocks are joined in pairs, with two matrix products for each doubling. That is as exact as forward
    substitution, where a series of powers of `a` would lose all digits if tokens repeat.
    """
    size = a.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    inverse, width = jnp.eye(size, dtype=a.dtype), 1
    while width < size:  # `inverse` has the diagonal blocks of this width
        corner = (row // width == column // width + 1) & (row // width % 2 == 1)
        below = jnp.where(corner, a, 0)
        more = (
            below if width == 1 else jnp.matmul(inverse, jnp.matmul(below, inverse, precision="highest"), precision="highest")
        )
        inverse, width = inverse - more, 2 * width
    return inverse


def _forward(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    by_left = _product("...ji,...jk->...ik", inverse, gradient)
    return (-jnp.tril(_product("...ij,...kj->...ik", by_left, inverse), -1),)


unit_lower_inverse.defvjp(_forward, _backward)
