"""Cross-entropy from hidden states, a few tokens' logits at a time.

The logits of a whole batch are the largest array of a fine-tuning step (8 x 4096 tokens x 128k words in float32 are
17 GB), and the loss is a scalar whose gradient with respect to them is known at once. So the gradients are taken in the
forward pass, chunk by chunk: the logits are computed once, never kept, and the backward pass only scales.

Legend: B batch, T length, C tokens of a chunk, E embed, V vocab.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.models.chunks import chunks, joined

# (parameters of the projection, hidden [B, C, E]) -> float32 logits [B, C, V]
Unembed = Callable[[Any, jax.Array], jax.Array]


class Sums(NamedTuple):
    """What is added over chunks, microbatches and devices, and divided once at the end."""

    loss: jax.Array  # sum of weight * -log p(target), float32
    weight: jax.Array  # sum of weights
    correct: jax.Array  # sum of weight where the most likely token is the target


# (hidden [B, C, E], targets [B, C], weights [B, C]) -> the same, laid out over the devices as the projection needs them
Arrange = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def as_it_is(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Leaves a chunk where it lies."""
    return hidden, targets, weights


def _chunk_sums(
    unembed: Unembed, arrange: Arrange, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> Sums:
    hidden, targets, weights = arrange(hidden, targets, weights)
    logits = unembed(params, hidden)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights)
    correct = jnp.sum((jnp.max(logits, axis=-1) <= picked) * weights)
    return Sums(loss, jnp.sum(weights), correct)


def chunked_cross_entropy(
    unembed: Unembed,
    length: int,
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    arrange: Arrange = as_it_is,
) -> Sums:
    """Weighted sums of the cross-entropy over all tokens.

    Args:
        unembed: the projection to the vocabulary; it may close over frozen arrays, but not over what is differentiated.
        length: tokens of each row whose logits exist at one time (C).
        params: what `unembed` takes and is differentiated: its trained parameters.
        hidden: [B, T, E].
        targets: [B, T] int32, the token to be predicted at each place.
        weights: [B, T] float32; zero where nothing is trained.
        arrange: lays each chunk out over the devices.
    """
    return _cross_entropy(unembed, arrange, length, params, hidden, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(unembed, arrange, length, params, hidden, targets, weights):
    def body(sums, chunk):
        return jax.tree.map(jnp.add, sums, _chunk_sums(unembed, arrange, params, *chunk)), None

    xs = tuple(chunks(x, length) for x in (hidden, targets, weights))
    return jax.lax.scan(body, Sums(*(jnp.zeros((), jnp.float32),) * 3), xs)[0]


def _forward(unembed, arrange, length, params, hidden, targets, weights):
    def body(carry, chunk):
        sums, d_params = carry
        h, *rest = chunk

        def loss(params, h):
            sums = _chunk_sums(unembed, arrange, params, h, *rest)
            return sums.loss, sums

        _, pull, more = jax.vjp(loss, params, h, has_aux=True)
        d_more, d_h = pull(jnp.float32(1))
        carry = jax.tree.map(jnp.add, sums, more), jax.tree.map(jnp.add, d_params, d_more)
        return carry, d_h

    xs = tuple(chunks(x, length) for x in (hidden, targets, weights))
    start = (Sums(*(jnp.zeros((), jnp.float32),) * 3), jax.tree.map(jnp.zeros_like, params))
    (sums, d_params), d_hidden = jax.lax.scan(body, start, xs)
    return sums, (d_params, joined(d_hidden, hidden.shape[1]))


def _backward(unembed, arrange, length, residuals, cotangent: Sums):
    d_params, d_hidden = jax.tree.map(lambda g: (g * cotangent.loss).astype(g.dtype), residuals)
    return d_params, d_hidden, None, None


_cross_entropy.defvjp(_forward, _backward)
