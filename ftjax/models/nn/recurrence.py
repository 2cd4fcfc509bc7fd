"""Building blocks of recurrent layers. The state is reset at each document of a packed row, and padding does not change it, so
that the same code serves packed training rows and decoding.

`segment_ids [B, T]` are those of `ftjax.models.nn.context.Context`: the document of each token, 0 for padding. The first token
of a row continues the state that it is given, which is zero at the start of a text.

Legend: B batch, T length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Return which tokens start another document than that of the row's first token."""
    found = (segment_ids != 0) & (segment_ids != jnp.roll(segment_ids, 1, axis=1))
    return found.at[:, 0].set(False)  # the row continues, or its state is already zero


def recur(
    step: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    state: Float[Array, " B *state"],
    inputs: Any,
    segment_ids: Int[Array, "B T"],
) -> tuple[Any, Float[Array, " B *state"]]:
    """Scan `step(state [B, ...], inputs of a token [B, ...]) -> (state, output)` over the tokens.

    Args:
        state: the state before the first token (`RecurrentState`); zeros at the start of a row.
        inputs: a pytree of arrays [B, T, ...].

    Returns `(outputs [B, T, ...], the state after the last token that is not padding)`.
    """

    def token(state: jax.Array, at: tuple) -> tuple[jax.Array, Any]:
        own, starts, real = at
        shape = (-1,) + (1,) * (state.ndim - 1)
        new, y = step(jnp.where(starts.reshape(shape), 0, state), own)
        return jnp.where(real.reshape(shape), new, state), y

    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, starts(segment_ids), segment_ids != 0))
    state, outputs = jax.lax.scan(token, state, along)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), outputs), state
