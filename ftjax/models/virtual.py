"""Virtual tokens before every document, for prefix tuning, prompt tuning and P-tuning.

They come first and attention is causal, so they attend only to each other: their keys and values are the same for every
document and are computed once. All documents of a packed row attend to them.
"""

from dataclasses import replace
from typing import Any

import jax

from ftjax.models.context import Context
from ftjax.models.layers import is_virtual


def behind_virtual_tokens(root: Any, tokens: jax.Array, ctx: Context) -> Context:
    """Return the context of tokens that follow the model's virtual tokens, if it has any.

    `root.virtual(root, ctx)` computes their `Prefix`; positions are shifted by their number.
    """
    virtual = getattr(root, "virtual", None)
    if virtual is None or is_virtual(tokens):  # nothing precedes the virtual tokens themselves
        return ctx
    prefix = virtual(root, ctx)
    return replace(ctx, prefix=prefix, positions=ctx.positions + prefix.keys.shape[1])
