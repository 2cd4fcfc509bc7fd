"""Building blocks of recurrent layers. The state is reset at each document of a packed row, and padding does not change it, so
that the same code serves packed training rows and decoding.

`segment_ids [B, T]` are those of `ftjax.models.nn.context.Context`: the document of each token, 0 for padding.

Legend: B batch, T length, C channels, W kernel size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv(
    x: Float[Array, "B T C"], weight: Float[Array, "W C"], before: Float[Array, "B W-1 C"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
    """Compute a depthwise causal convolution; the last row of the weight applies to the token itself.

    Args:
        before: the row's inputs before x (`ConvState`); zeros if the row starts with x.

    Returns the output and the last W - 1 inputs, not counting padding on the right as inputs.
    """
    length, taps = x.shape[1], weight.shape[0]
    inputs = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    first = segment_ids[:, :1]  # earlier inputs belong to the document that continues
    segments = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], taps - 1)), segment_ids], axis=1)
    y = jnp.zeros_like(x)
    for tap in range(taps):
        same = segments[:, tap : tap + length] == segment_ids
        y = y + jnp.where(same[..., None], inputs[:, tap : tap + length], 0) * weight[tap].astype(x.dtype)
    index = jnp.arange(length, dtype=jnp.int32)
    count = jnp.max(jnp.where(segment_ids != 0, index + 1, 0), axis=1)
    last = count[:, None] + jnp.arange(taps - 1, dtype=jnp.int32)
    return y, jnp.take_along_axis(inputs, last[..., None], axis=1)


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
    starts = (segment_ids != 0) & (segment_ids != jnp.roll(segment_ids, 1, axis=1))
    starts = starts.at[:, 0].set(False)  # the row continues, or its state is already zero

    def token(state: jax.Array, at: tuple) -> tuple[jax.Array, Any]:
        own, starts, real = at
        shape = (-1,) + (1,) * (state.ndim - 1)
        new, y = step(jnp.where(starts.reshape(shape), 0, state), own)
        return jnp.where(real.reshape(shape), new, state), y

    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, starts, segment_ids != 0))
    state, outputs = jax.lax.scan(token, state, along)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), outputs), state
