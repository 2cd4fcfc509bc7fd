"""Losses from hidden states, with the logits of a few tokens at a time.

The logits of a whole batch are the largest array of a fine-tuning step (8 x 4096 tokens x 128k words in float32 are 17 GB). If
a loss is a weighted sum over tokens, its gradient with respect to them is known at once, so `token_totals` computes the
gradients in the forward pass, chunk by chunk: the logits are computed once, never saved, and the backward pass only scales.
Other losses use `ftjax.objectives.logprobs`. On one device, trained tokens come first (`trained_first`), and chunks without any
are not computed at all.

Legend: B batch, T length, C tokens of a chunk, E embed, V vocab.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ftjax.models.nn.chunks import chunks, joined

# (parameters of the projection, hidden [B, C, E]) -> float32 logits [B, C, V]
Unembed = Callable[[Any, jax.Array], jax.Array]


class LossTotals(NamedTuple):
    """Sums over chunks, microbatches and devices, divided once at the end.

    Attributes:
        loss: float32 [], the summed loss.
        weight: float32 [], the divisor of that sum. It need not be the sum of the tokens' weights, which may be signed.
        metrics: by name, a sum and its divisor, both float32 [].
    """

    loss: jax.Array
    weight: jax.Array
    metrics: Mapping[str, tuple[jax.Array, jax.Array]]


# (float32 logits [B, C, V], targets [B, C] or [B, C, ...] or a tree of such, weights [B, C]) -> their totals
Measure = Callable[[jax.Array, Any, jax.Array], LossTotals]


def cross_entropy(logits: Float[Array, "B C V"], targets: Int[Array, "B C"], weights: Float[Array, "B C"]) -> LossTotals:
    """Sum weight * -log p(target) over tokens.

    `token_accuracy` sums the weights of targets that greedy decoding writes: the most likely token, the first if several are
    equal.
    """
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights)
    correct = jnp.sum(jnp.where(jnp.argmax(logits, axis=-1) == targets, weights, 0))
    weight = jnp.sum(weights)
    return LossTotals(loss, weight, {"token_accuracy": (correct, weight)})


# (hidden [B, C, E], targets [B, C], weights [B, C]) -> the same, sharded as the projection needs them
Arrange = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any, jax.Array]]


def keep_sharding(
    hidden: Float[Array, "B C E"], targets: Any, weights: Float[Array, "B C"]
) -> tuple[jax.Array, Any, jax.Array]:
    """Leave a chunk sharded as it is."""
    return hidden, targets, weights


def trained_order(weights: Float[Array, "B T"]) -> Int[Array, " B*T"]:
    """Order the tokens of a batch so that those with weight come first; the order is stable."""
    return jnp.argsort(weights.reshape(-1) == 0, stable=True)


def reorder(x: Shaped[Array, "B T *of"], order: Int[Array, " tokens"]) -> Shaped[Array, "1 tokens *of"]:
    """Put the tokens of a batch into one row in the given order."""
    return jnp.asarray(x).reshape(-1, *x.shape[2:]).at[order].get(unique_indices=True, mode="promise_in_bounds")[None]


def trained_first(hidden: Any, targets: Any, weights: Float[Array, "B T"]) -> tuple[Any, Any, Float[Array, "1 tokens"]]:
    """Put all tokens of a batch into one row, those with weight first: `[B, T, ...]` -> `[1, B * T, ...]`."""
    order = trained_order(weights)
    return jax.tree.map(lambda x: reorder(x, order), (hidden, targets, weights))


def zeros_of(run: Callable[[], Any]) -> Any:
    """Return zeros of the shapes and dtypes that `run()` would return."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run))


def unless_idle(skip: bool, run: Callable[[], Any], weights: Float[Array, "B C"]) -> Any:
    """Compute `run()`, or zeros of its shapes if `skip` is set and no token of the chunk has weight."""
    if not skip:
        return run()
    nothing = zeros_of(run)
    return jax.lax.cond(jnp.any(weights != 0), run, lambda: nothing)


def token_totals(
    unembed: Unembed,
    length: int,
    params: Any,
    hidden: Any,
    targets: Any,
    weights: Float[Array, "B T"],
    arrange: Arrange = keep_sharding,
    skip: bool = False,
    measure: Measure = cross_entropy,
) -> LossTotals:
    """Sum the cross-entropy, or another `measure`, over all tokens.

    Args:
        unembed: the projection to the vocabulary; it may close over frozen arrays, but not over differentiated ones.
        length: tokens per row whose logits exist at one time (C).
        params: differentiated argument of `unembed`: its trained parameters.
        hidden: hidden states `[B, T, E]`, or a tree of differentiated arrays `[B, T, ...]` that `unembed` and `arrange` take.
        targets: the token to predict at each position, or what else `measure` takes: an array `[B, T, ...]` or a tree of them.
            No gradient flows into it.
        weights: zero for tokens that are not trained.
        arrange: shards each chunk over the devices.
        skip: skip chunks without trained tokens; several devices would have to agree on it first.
    """
    return _totals(unembed, arrange, measure, length, skip, params, hidden, targets, weights)


def _chunk_totals(unembed, arrange, measure, params, hidden, targets, weights) -> LossTotals:
    hidden, targets, weights = arrange(hidden, targets, weights)
    return measure(unembed(params, hidden), targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _totals(unembed, arrange, measure, length, skip, params, hidden, targets, weights):
    def of(chunk):
        return _chunk_totals(unembed, arrange, measure, params, *chunk)

    def body(totals, chunk):
        return jax.tree.map(jnp.add, totals, unless_idle(skip, lambda: of(chunk), chunk[-1])), None

    xs = _in_chunks(length, hidden, targets, weights)
    return jax.lax.scan(body, zeros_of(lambda: of(_first(xs))), xs)[0]


def _forward(unembed, arrange, measure, length, skip, params, hidden, targets, weights):
    def gradients(chunk):
        h, *rest = chunk

        def loss(params, h):
            totals = _chunk_totals(unembed, arrange, measure, params, h, *rest)
            return totals.loss, totals

        _, pull, totals = jax.vjp(loss, params, h, has_aux=True)
        return totals, *pull(jnp.float32(1))

    def body(carry, chunk):
        totals, d_params = carry
        more, d_more, d_h = unless_idle(skip, lambda: gradients(chunk), chunk[-1])
        carry = jax.tree.map(jnp.add, totals, more), added(d_params, d_more)
        return carry, d_h

    xs = _in_chunks(length, hidden, targets, weights)
    totals = zeros_of(lambda: _chunk_totals(unembed, arrange, measure, params, *_first(xs)))
    (totals, d_params), d_hidden = jax.lax.scan(body, (totals, float32_zeros(params)), xs)
    d_params = jax.tree.map(lambda g, x: g.astype(x.dtype), d_params, params)
    return totals, (d_params, jax.tree.map(lambda x: joined(x, weights.shape[1]), d_hidden))


def _in_chunks(length: int, *tokens: Any) -> tuple[Any, ...]:
    return jax.tree.map(lambda x: chunks(x, length), tokens)


def _first(xs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the first chunk."""
    return jax.tree.map(lambda x: x[0], xs)


def float32_zeros(params: Any) -> Any:
    """Return zeros to sum gradients of these parameters in: float32, or wider if they are."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, np.promote_types(x.dtype, np.float32)), params)


def added(sums: Any, more: Any) -> Any:
    """Add gradients to sums in the dtype of the sums."""
    return jax.tree.map(lambda total, one: total + one.astype(total.dtype), sums, more)


def _backward(unembed, arrange, measure, length, skip, residuals, cotangent: LossTotals):
    wide = np.promote_types(np.float32, cotangent.loss.dtype)
    d_params, d_hidden = jax.tree.map(lambda g: (g.astype(wide) * cotangent.loss).astype(g.dtype), residuals)
    return d_params, d_hidden, None, None


_totals.defvjp(_forward, _backward)
