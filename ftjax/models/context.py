"""Inputs shared by all layers in one forward pass.

Legend: B batch, T query length, K kv heads, H head dim, L layers, V virtual tokens.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Prefix:
    """Keys and values of virtual tokens before every document; keys are stored after RoPE, at positions 0 to V - 1."""

    keys: jax.Array  # [L, V, K, H]
    values: jax.Array  # [L, V, K, H]


@dataclass(frozen=True)
class Context:
    """Settings and inputs of one forward pass, shared by its layers.

    Attributes:
        positions: [B, T] int32, the RoPE position of each token; positions restart with each document.
        segment_ids: [B, T] int32, the document of each token in its row; 0 is padding.
        dtype: dtype of activations and matrix products.
        attention: the attention backend (`ftjax.models.attention.choose`).
        remat: what a block saves for its backward pass (`ftjax.models.stack.REMAT_POLICIES`), or `none` to save everything.
        dropout: PRNG key of this layer's dropout masks; None outside training.
        rope: the family's position embedding, computed once for all layers.
        prefix: virtual tokens that precede every document (`ftjax.models.virtual`), or None.
        whole_weights: whether weights have been gathered already (`ftjax.models.chunks`).
    """

    positions: jax.Array
    segment_ids: jax.Array
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    dropout: jax.Array | None = None
    rope: Any = None
    prefix: Prefix | None = None
    whole_weights: bool = False
