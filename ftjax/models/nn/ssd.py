"""State space duality (SSD), the recurrence of Mamba-2, in chunks of matrix products.

For one head, with a state `S [H, D]`, a step `s > 0` and a rate `a < 0`:

    S = exp(s a) S + b (s x)^T;  y = S^T c

That is linear attention with queries c, keys b, values `s x`, and a decay. Everything is computed in float32.

Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv:2405.21060, section 6).

Legend: B batch, T length, K groups, R heads per group, N = K R, H size of the state, D size of a head, C tokens of a chunk,
c chunks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from ftjax.models.nn.decays import CHUNK, chunk_length, chunked, decays

_product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def state_space(
    x: Float[Array, "B T N D"],
    b: Float[Array, "B T K H"],
    c: Float[Array, "B T K H"],
    step: Float[Array, "B T N"],
    rate: Float[Array, " N"],
    state: Float[Array, "B N H D"],
    segment_ids: Int[Array, "B T"],
    chunk: int = CHUNK,
) -> tuple[Float32[Array, "B T N D"], Float32[Array, "B N H D"]]:
    """Return the outputs, and the state after the last token that is not padding.

    The state is zero at the start of each document (`ftjax.models.nn.recurrence`): no product has a term of two documents.

    Args:
        b, c: each group serves R consecutive heads.
        step, rate: s and a.
        state: before the first token.
        segment_ids: the document of each token; 0 is padding, whose output has no meaning.
        chunk: C, a power of two.
    """
    x, b, c, step, rate, state = (value.astype(jnp.float32) for value in (x, b, c, step, rate, state))
    step = jnp.where((segment_ids != 0)[..., None], step, 0)  # padding neither forgets nor writes
    g, x = step * rate, step[..., None] * x
    if x.shape[1] == 1:
        return _one_token(x, b, c, g, state)
    return _in_chunks(x, b, c, g, state, segment_ids, chunk)


def _one_token(x, b, c, g, state) -> tuple[jax.Array, jax.Array]:
    b, c = (jnp.repeat(value[:, 0], x.shape[2] // b.shape[2], axis=1) for value in (b, c))  # [B, N, H]
    state = jnp.exp(g[:, 0])[..., None, None] * state + b[..., None] * x[:, 0, :, None]
    return _product("bnhd,bnh->bnd", state, c)[:, None], state


def _in_chunks(x, b, c, g, state, segment_ids, chunk: int) -> tuple[jax.Array, jax.Array]:
    (rows, t, heads, size), groups = x.shape, b.shape[2]
    chunk, repeats = chunk_length(t, chunk), heads // groups
    asked, keys = chunked(c, chunk, -2), chunked(b, chunk, -2)  # [c, B, K, C, H]
    values = chunked(x.reshape(rows, t, groups, repeats, size), chunk, -2)  # [c, B, K, R, C, D]
    between, enter, leave, kept = decays(g.reshape(rows, t, groups, repeats), segment_ids, chunk)

    added = _product("cbkjh,cbkrjd->cbkrhd", keys, values * leave[..., None])

    def next_chunk(state: jax.Array, of_chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        added, kept = of_chunk
        return kept[..., None, None] * state + added, state

    state, before = jax.lax.scan(next_chunk, state.reshape(rows, groups, repeats, -1, size), (added, kept))
    weights = _product("cbkih,cbkjh->cbkij", asked, keys)[:, :, :, None] * between
    y = _product("cbkrij,cbkrjd->cbkrid", weights, values)
    y = y + _product("cbkih,cbkrhd->cbkrid", asked, before) * enter[..., None]
    y = jnp.moveaxis(y, (0, -2), (1, 2)).reshape(rows, -1, heads, size)[:, :t]
    return y, state.reshape(rows, heads, -1, size)
