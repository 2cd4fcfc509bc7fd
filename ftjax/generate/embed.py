"""Compute embeddings of texts: their last hidden state, or the mean of all.

Legend: B batch, T length, E embed.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from ftjax.generate.decode import Runner
from ftjax.models.nn.context import Context

Pooling = Literal["last", "mean"]


def embed_step(
    runner: Runner,
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    pooling: Pooling,
) -> Float32[Array, "B E"]:
    """Return the pooled hidden states of each row, after the last norm; padding, with `segment_ids` 0, does not count."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ctx = Context(positions, segment_ids, runner.dtype)
    hidden = runner.model.bind(params).hidden(tokens, ctx)[0].astype(jnp.float32)
    counts = jnp.sum(segment_ids > 0, axis=1)
    if pooling == "last":
        return jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    total = jnp.sum(jnp.where((segment_ids > 0)[..., None], hidden, 0), axis=1)
    return total / jnp.maximum(counts, 1)[:, None].astype(jnp.float32)
