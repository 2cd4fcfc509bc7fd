"""Decays between the tokens of a row that is split into chunks, for layers whose state forgets.

Within a chunk such a layer computes with matrix products, and only its state goes from chunk to chunk. A state is zero at the
start of each document (`ftjax.models.nn.recurrence`): every factor between two documents is exactly 0.

Legend: B batch, T length, K key heads, R value heads per key head, C tokens of a chunk, c chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ftjax.models.nn.recurrence import starts

CHUNK = 64
SMALLEST = 16  # tokens of a chunk in short rows


class Decays(NamedTuple):
    """Factors of each chunk and value head.

    Attributes:
        between: from token j to a later or the same token i; 0 elsewhere.
        enter: from the state before the chunk to each token.
        leave: from each token to the end of the chunk.
        kept: of the state before the chunk, at its end.
    """

    between: Float[Array, "c B K R C C"]
    enter: Float[Array, "c B K R C"]
    leave: Float[Array, "c B K R C"]
    kept: Float[Array, "c B K R"]


def chunk_length(length: int, longest: int) -> int:
    """Return C for a row of this length: a power of two, at most `longest`."""
    return min(longest, max(SMALLEST, 1 << (length - 1).bit_length()))


def chunked(x: Shaped[Array, "B T *of"], chunk: int, place: int, mode: str = "constant") -> Shaped[Array, "c B ..."]:
    """Split `[B, T, ...]` into `[c, B, ...]` with the chunk's tokens as axis `place`; T is padded as in `jnp.pad`."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2), mode=mode)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), (1, 2), (0, place))


def decays(g: Float[Array, "B T K R"], segment_ids: Int[Array, "B T"], chunk: int) -> Decays:
    """Return the factors for chunks of so many tokens.

    Args:
        g: the logarithm of each token's decay, at most 0, and 0 for padding.
    """
    g = chunked(g, chunk, -1)
    # Documents are numbered from that of the first token, which continues the state, and padding belongs to the one before it.
    document = chunked(jnp.cumsum(starts(segment_ids), axis=1, dtype=jnp.int32), chunk, -1, "edge")  # [c, B, C]
    last = document[..., -1:]
    before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    sees = jnp.tril(document[..., :, None] == document[..., None, :])
    # Logarithms since the start of the chunk or document. Exponents are masked, not their results: those of tokens that do not
    # see each other may be positive and large.
    total = jnp.einsum("cbij,cbkrj->cbkri", sees.astype(jnp.float32), g, precision=jax.lax.Precision.HIGHEST)
    return Decays(
        between=_exp(sees[:, :, None, None], total[..., :, None] - total[..., None, :]),
        enter=_exp((document == before)[:, :, None, None], total),
        leave=_exp((document == last)[:, :, None, None], total[..., -1:] - total),
        kept=_exp((last == before)[:, :, None], total[..., -1]),
    )


def _exp(where: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.exp(jnp.where(where, x, -jnp.inf))
