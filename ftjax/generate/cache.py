"""Run forward passes with a cache, and round sizes to buckets.

Legend: B batch, T query length, E embed.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.models.nn.cache import Cache
from ftjax.models.nn.context import Context


def forward(
    module: Any, tokens: Int[Array, "B T"], counts: Int[Array, " B"], cache: Cache, dtype: Any, *,
    whole: Int[Array, " B"] | None = None, adapters: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T E"], Cache]:  # fmt: skip
    """Return the hidden states of each row's next tokens, of which the first `counts` are not padding, and the cache.

    Only this function advances a cache; model families just read and write it.

    Args:
        whole: lengths of the texts that these tokens are a part of, for a RoPE that depends on it; None: they end here.
        adapters: the adapter of each row (`Context.adapters`).
    """
    length, shown = tokens.shape[1], counts
    index = jnp.arange(length + (whole is not None), dtype=jnp.int32)
    # Keep padding within the valid positions: a NaN from a position outside a learned table would stay in the cache slot.
    positions = jnp.maximum(cache.lengths[:, None] + jnp.minimum(index, counts[:, None] - 1), 0)
    if whole is not None:  # RoPE takes a text's length from its last token: show it one, whose keys are not kept
        tokens, shown = jnp.pad(tokens, ((0, 0), (0, 1))), counts + 1
        positions = jnp.where(index == counts[:, None], jnp.maximum(whole - 1, 0)[:, None], positions)
    ctx = Context(positions, (index < shown[:, None]).astype(jnp.int32), dtype, adapters=adapters)
    hidden, cache, _ = module.hidden(tokens, ctx, cache.expecting(counts))
    return hidden[:, :length], cache.advance(counts)


def bucket(size: int, smallest: int = 1) -> int:
    """Round `size` up to a multiple of a quarter of a power of two (32, 40, 48, 56, 64, 80 ...).

    This wastes at most a fifth and keeps the number of compiled shapes small.
    """
    if size <= smallest:
        return smallest
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step
