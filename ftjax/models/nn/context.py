"""Inputs shared by all layers in one forward pass.

Legend: B batch, T query length, K kv heads, H head dim, L layers, V virtual tokens, P size of a layer's own input.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Tokens = Int[Array, "B T"] | Float[Array, "B T E"]  # ids, or the embeddings of virtual tokens, which have none


@dataclass(frozen=True)
class Prefix:
    """Keys and values of virtual tokens before every document; keys are stored after RoPE, at positions 0 to V - 1."""

    keys: Float[Array, "L virtual K H"]
    values: Float[Array, "L virtual K H"]


class Branching(NamedTuple):
    """Which tokens of a row see which, where documents share their start: those before the slot `ends` of a token see it.

    Two documents `1 2 3` and `1 2 4 5`, which share `1 2`:

        slot        0  1  2  3  4
        token       1  2  3  4  5
        position    0  1  2  2  3
        segment     1  1  1  2  2     a shared start counts as a part of the first document
        end         5  5  3  5  5

    Attributes:
        segments: the document of each token; 0 is padding.
        ends: see above; 0 for padding, which nothing sees.
    """

    segments: Int[Array, "B T"]
    ends: Int[Array, "B T"]


@dataclass(frozen=True)
class Context:
    """Settings and inputs of one forward pass, shared by its layers.

    Attributes:
        positions: the RoPE position of each token; positions restart with each document.
        segment_ids: the document of each token in its row; 0 is padding.
        dtype: dtype of activations and matrix products.
        attention: the attention backend (`ftjax.models.nn.attention.choose`).
        remat: what a block saves for its backward pass (`ftjax.models.nn.remat.REMAT_POLICIES`), or `none` to save everything.
        dropout: PRNG key of this layer's dropout masks; None outside training.
        rope: the family's position embedding, computed once for all layers.
        own_input: inputs of the layers besides x, `[L, B, T, P]`; a layer gets its own, `[B, T, P]`. None without such inputs.
        prefix: virtual tokens that precede every document (`after_virtual_tokens`), or None.
        whole_weights: whether weights have been gathered already (`ftjax.models.nn.chunks`).
        adapters: the adapter of each row, where layers hold several (`ftjax.methods.lora_stack`); 0 is none.
        ends: where documents share their start, see `Branching`; None elsewhere. Only for models of which
            `ftjax.models.nn.stack.branches` says so.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    dropout: jax.Array | None = None
    rope: Any = None
    own_input: Float[Array, "*layers B T P"] | None = None
    prefix: Prefix | None = None
    whole_weights: bool = False
    adapters: Int[Array, " rows"] | None = None
    ends: Int[Array, "B T"] | None = None


def is_virtual(tokens: Tokens) -> bool:
    """Return whether these are embeddings `[B, T, E]` rather than ids `[B, T]`."""
    return bool(jnp.issubdtype(tokens.dtype, jnp.floating))


def after_virtual_tokens(root: Any, tokens: Tokens, ctx: Context) -> Context:
    """Return the context of tokens that follow the model's virtual tokens, if it has any.

    `root.virtual(root, ctx)` computes their `Prefix`; positions are shifted by their number.
    """
    virtual = getattr(root, "virtual", None)
    if virtual is None or is_virtual(tokens):  # nothing precedes the virtual tokens themselves
        return ctx
    prefix = virtual(root, ctx)
    return replace(ctx, prefix=prefix, positions=ctx.positions + prefix.keys.shape[1])
