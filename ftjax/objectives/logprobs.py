"""Log-probabilities of tokens from hidden states, without holding the logits of a batch.

Logits are computed for a few tokens at a time, and recomputed in the backward pass: any function of the log-probabilities can
be a loss, while `ftjax.objectives.loss.token_totals`, which computes them once, needs a weighted sum.

Legend: B batch, T length, C tokens of a chunk, E embed, V vocab, K most likely tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ftjax.mesh import constrain
from ftjax.models.nn.chunks import chunks, joined
from ftjax.objectives.loss import added, float32_zeros, reorder, trained_order, unless_idle
from ftjax.objectives.projection import Projection, one_device


class TokenLogprobs(NamedTuple):
    """Predictions for each target `[B, T]`; zeros (and False) for targets that are left out.

    Attributes:
        logprobs: float32 [B, T], log p(target), natural logarithm.
        greedy: bool [B, T], whether greedy decoding writes the target: the most likely token, the first if several are equal.
        entropy: float32 [B, T] in nats, of the distribution over the vocabulary; None unless asked for.
        top: (int32 [B, T, K] ids, float32 [B, T, K] log-probabilities) of the K most likely tokens, the likeliest first; None
            unless asked for. No gradient flows through them.
    """

    logprobs: jax.Array
    greedy: jax.Array
    entropy: jax.Array | None = None
    top: tuple[jax.Array, jax.Array] | None = None


def token_logprobs(
    output: Projection,
    hidden: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
    chunk: int,
    wanted: Shaped[Array, "B T"] | None = None,
    *,
    entropy: bool = False,
    top: int = 0,
    temperature: float = 1.0,
) -> TokenLogprobs:
    """Compute the log-probabilities of `targets` at each position.

    Gradients flow to hidden states and to the trained parameters of the projection, through `logprobs` and `entropy`.

    Args:
        hidden: final hidden states.
        chunk: tokens per row whose logits exist at one time (C).
        wanted: zero at targets to leave out: on one device, chunks of nothing else are not computed. None for all.
        entropy: compute the entropy, too.
        top: number of most likely tokens to return (K).
        temperature: divides the logits.
    """
    keep = jnp.ones(targets.shape, jnp.float32) if wanted is None else (wanted != 0).astype(jnp.float32)
    alone = one_device() and wanted is not None
    order = trained_order(keep) if alone else None
    if alone:
        inputs, length = [reorder(x, order) for x in (hidden, targets, keep)], chunk * targets.shape[0]
    else:
        inputs, length = [hidden, targets, keep], chunk
    of = partial(_of_chunk, entropy, top, temperature)
    found = per_token(output.unembed, output.arrange, of, min(length, inputs[1].shape[1]), alone, output.trained, *inputs)
    if not alone:
        return found
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    return jax.tree.map(lambda x: reorder(x, back).reshape(*targets.shape, *x.shape[2:]), found)


def segment_sums(values: Float[Array, "B T"], segment_ids: Int[Array, "B T"], segments: int) -> Float[Array, "B {segments}"]:
    """Sum over each document of packed rows; segment 1 of a row is at index 0.

    Args:
        segment_ids: from 1; 0 is padding and is left out.
        segments: the most segments of a row; higher ids are left out.
    """

    def of_row(values, ids):
        return jax.ops.segment_sum(values, ids, num_segments=segments + 1)[1:]

    return jax.vmap(of_row)(values, segment_ids)


def _of_chunk(
    entropy: bool,
    top: int,
    temperature: float,
    logits: Float[Array, "B C V"],
    targets: Int[Array, "B C"],
    keep: Float[Array, "B C"],
) -> TokenLogprobs:
    if temperature != 1:
        logits = logits / temperature
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = jnp.where(keep > 0, picked - normaliser, 0.0)
    greedy = (jnp.argmax(logits, axis=-1) == targets) & (keep > 0)
    spread, best = None, None
    if entropy:
        probabilities = jnp.exp(logits - normaliser[..., None])
        # p log p is 0 if p is, also for logits of -inf, whose products and gradients would be NaN
        mean = jnp.sum(probabilities * jnp.where(jnp.isneginf(logits), 0.0, logits), axis=-1)
        spread = jnp.where(keep > 0, normaliser - mean, 0.0)
    if top:
        values, ids = jax.lax.top_k(jax.lax.stop_gradient(logits), top)
        values = values - jax.lax.stop_gradient(normaliser)[..., None]
        shown = keep[..., None] > 0
        best = jnp.where(shown, ids, 0), jnp.where(shown, values, 0.0)
    return TokenLogprobs(logprobs, greedy, spread, best)


# (logits [B, C, V], targets [B, C], keep [B, C]) -> result per token: `TokenLogprobs`, or without gradients any tree of arrays
OfChunk = Callable[[jax.Array, jax.Array, jax.Array], Any]


def _chunk(unembed, arrange, of: OfChunk, params, hidden, targets, keep) -> Any:
    found = of(unembed(params, (arranged := arrange(hidden, targets, keep))[0]), *arranged[1:])
    return jax.tree.map(lambda x: constrain(x, "batch", "length", *(None,) * (x.ndim - 2)), found)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def per_token(unembed, arrange, of, length, skip, params, hidden, targets, keep) -> Any:
    """Return the result of `of` for all tokens, a chunk of `length` tokens per row at a time."""

    def body(_, chunk):
        return None, unless_idle(skip, lambda: _chunk(unembed, arrange, of, params, *chunk), chunk[-1])

    _, found = jax.lax.scan(body, None, tuple(chunks(x, length) for x in (hidden, targets, keep)))
    return jax.tree.map(lambda x: joined(x, targets.shape[1]), found)


def _forward(unembed, arrange, of, length, skip, params, hidden, targets, keep):
    return per_token(unembed, arrange, of, length, skip, params, hidden, targets, keep), (params, hidden, targets, keep)


def _backward(unembed, arrange, of, length, skip, inputs: Any, cotangent: TokenLogprobs):
    params, hidden, targets, keep = inputs

    def gradients(h, targets, keep, cotangents):
        def differentiable(params, h):
            found = _chunk(unembed, arrange, of, params, h, targets, keep)
            return [found.logprobs] if found.entropy is None else [found.logprobs, found.entropy]

        return jax.vjp(differentiable, params, h)[1](cotangents)

    def body(d_params, chunk):
        h, targets, keep, *cotangents = chunk
        d_more, d_h = unless_idle(skip, lambda: gradients(h, targets, keep, cotangents), keep)
        return added(d_params, d_more), d_h

    cotangents = [cotangent.logprobs] if cotangent.entropy is None else [cotangent.logprobs, cotangent.entropy]
    xs = tuple(chunks(x, length) for x in (hidden, targets, keep, *cotangents))
    d_params, d_hidden = jax.lax.scan(body, float32_zeros(params), xs)
    d_params = jax.tree.map(lambda g, x: g.astype(x.dtype), d_params, params)
    return d_params, joined(d_hidden, hidden.shape[1]), None, None


per_token.defvjp(_forward, _backward)
