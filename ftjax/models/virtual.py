"""Virtual tokens before every document: the seam of prefix tuning, prompt tuning and P-tuning.

They come first and attention is causal, so that they see only one another: their keys and values are the same for every
document, and are computed once. Documents that are packed into one row see them all the same.
"""

from dataclasses import replace
from typing import Any

import jax

from ftjax.models.context import Context
from ftjax.models.layers import is_virtual


def behind_virtual_tokens(root: Any, tokens: jax.Array, ctx: Context) -> Context:
    """The context of tokens behind those that a method gave the model, if it did: `root.virtual(root, ctx)` makes their
    `Prefix`, and positions move on by their number."""
    virtual = getattr(root, "virtual", None)
    if virtual is None or is_virtual(tokens):  # the virtual tokens themselves have nothing before them
        return ctx
    prefix = virtual(root, ctx)
    return replace(ctx, prefix=prefix, positions=ctx.positions + prefix.keys.shape[1])
