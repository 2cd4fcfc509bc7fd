"""Cross-entropy from hidden states, a few tokens' logits at a time.

The logits of a whole batch are the largest array of a fine-tuning step (8 x 4096 tokens x 128k words in float32 are
17 GB), and the loss is a scalar whose gradient with respect to them is known at once. So the gradients are taken in the
forward pass, chunk by chunk: the logits are computed once, never kept, and the backward pass only scales. Where one device
holds the batch, tokens that are trained come first (`trained_first`), and chunks without any are not computed at all.

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
    correct: jax.Array  # sum of weight where greedy decoding writes the target: the most likely token, of several the first


# (float32 logits [B, C, V], targets [B, C] or [B, C, ...], weights [B, C]) -> their sums
Measure = Callable[[jax.Array, jax.Array, jax.Array], Sums]


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
    """Of tokens `targets` [B, C]."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights)
    correct = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights)
    return Sums(loss, jnp.sum(weights), correct)


# (hidden [B, C, E], targets [B, C], weights [B, C]) -> the same, laid out over the devices as the projection needs them
Arrange = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def as_it_is(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Leaves a chunk where it lies."""
    return hidden, targets, weights


def trained_first(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All tokens of a batch as one row, those that carry weight before the others: `[B, T, ...]` -> `[1, B * T, ...]`."""
    order = jnp.argsort(weights.reshape(-1) == 0, stable=True)

    def ordered(x: jax.Array) -> jax.Array:
        return jnp.asarray(x).reshape(-1, *x.shape[2:]).at[order].get(unique_indices=True, mode="promise_in_bounds")[None]

    return ordered(hidden), ordered(targets), ordered(weights)


def _chunk_sums(
    unembed: Unembed, arrange: Arrange, measure: Measure, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> Sums:
    hidden, targets, weights = arrange(hidden, targets, weights)
    return measure(unembed(params, hidden), targets, weights)


def chunked_cross_entropy(
    unembed: Unembed,
    length: int,
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    arrange: Arrange = as_it_is,
    skip: bool = False,
    measure: Measure = cross_entropy,
) -> Sums:
    """Weighted sums of the cross-entropy, or what else `measure` gives, over all tokens.

    Args:
        unembed: the projection to the vocabulary; it may close over frozen arrays, but not over what is differentiated.
        length: tokens of each row whose logits exist at one time (C).
        params: what `unembed` takes and is differentiated: its trained parameters.
        hidden: [B, T, E].
        targets: [B, T] int32, the token to be predicted at each place; [B, T, ...] where `measure` takes them.
        weights: [B, T] float32; zero where nothing is trained.
        arrange: lays each chunk out over the devices.
        skip: chunks in which nothing is trained are not computed; on several devices they would have to agree on it first.
    """
    return _cross_entropy(unembed, arrange, measure, length, skip, params, hidden, targets, weights)


def _unless_idle(skip: bool, run: Callable[[], Any], weights: jax.Array) -> Any:
    """`run()`; zeros of its shapes where no token of the chunk carries weight and `skip` is set."""
    if not skip:
        return run()
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run))
    return jax.lax.cond(jnp.any(weights != 0), run, lambda: nothing)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _cross_entropy(unembed, arrange, measure, length, skip, params, hidden, targets, weights):
    def body(sums, chunk):
        more = _unless_idle(skip, lambda: _chunk_sums(unembed, arrange, measure, params, *chunk), chunk[-1])
        return jax.tree.map(jnp.add, sums, more), None

    xs = tuple(chunks(x, length) for x in (hidden, targets, weights))
    return jax.lax.scan(body, Sums(*(jnp.zeros((), jnp.float32),) * 3), xs)[0]


def _forward(unembed, arrange, measure, length, skip, params, hidden, targets, weights):
    def body(carry, chunk):
        sums, d_params = carry
        h, *rest = chunk

        def loss(params, h):
            sums = _chunk_sums(unembed, arrange, measure, params, h, *rest)
            return sums.loss, sums

        def gradients():
            _, pull, sums = jax.vjp(loss, params, h, has_aux=True)
            return sums, *pull(jnp.float32(1))

        more, d_more, d_h = _unless_idle(skip, gradients, rest[-1])
        carry = jax.tree.map(jnp.add, sums, more), jax.tree.map(jnp.add, d_params, d_more)  # in float32, whatever d_more is
        return carry, d_h

    xs = tuple(chunks(x, length) for x in (hidden, targets, weights))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params)
    (sums, d_params), d_hidden = jax.lax.scan(body, (Sums(*(jnp.zeros((), jnp.float32),) * 3), zeros), xs)
    d_params = jax.tree.map(lambda g, x: g.astype(x.dtype), d_params, params)
    return sums, (d_params, joined(d_hidden, hidden.shape[1]))


def _backward(unembed, arrange, measure, length, skip, residuals, cotangent: Sums):
    d_params, d_hidden = jax.tree.map(lambda g: (g * cotangent.loss).astype(g.dtype), residuals)
    return d_params, d_hidden, None, None


_cross_entropy.defvjp(_forward, _backward)
