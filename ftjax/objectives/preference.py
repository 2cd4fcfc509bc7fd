"""What the objectives that compare two answers share: sums over the answers of each pair, and TRL's metrics.

Legend: B batch, T length, P pairs of a row, A microbatches.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from ftjax.objectives.logprobs import segment_sums
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import Forward, LossInputs


class Both(NamedTuple):
    """A value of the chosen and of the rejected answer of each pair, `[B, P]`; 0 where a row has fewer pairs."""

    chosen: jax.Array
    rejected: jax.Array

    def __sub__(self, other: "Both") -> "Both":
        return Both(self.chosen - other.chosen, self.rejected - other.rejected)

    def divided_by(self, other: "Both") -> "Both":
        """Divide by numbers of tokens; 0 tokens count as 1."""
        return Both(*(value / jnp.maximum(count, 1) for value, count in zip(self, other, strict=True)))

    def scaled(self, factor: float) -> "Both":
        return Both(factor * self.chosen, factor * self.rejected)


def documents_per_row(length: int) -> int:
    """Return the most documents that a row of pairs may have: each has two tokens at least."""
    return 2 * max(1, length // 4)


def answer_sums(values: Float[Array, "B T"], batch: Mapping[str, Shaped[Array, "B _"]]) -> Both:
    """Sum over the documents of each pair."""
    segments = batch["segment_ids"]
    sums = segment_sums(values, segments, documents_per_row(segments.shape[1]))
    return Both(sums[:, ::2], sums[:, 1::2])


def answer_lengths(batch: Mapping[str, Shaped[Array, "B _"]]) -> Both:
    """Count the tokens of each answer: float32 `[B, P]`, 0 where there is no pair."""
    return answer_sums((batch["weights"] != 0).astype(jnp.float32), batch)


def answer_logprobs(forward: Forward, tail_weight: float | None = None) -> Both:
    """Sum the log-probabilities of the tokens of each answer.

    Args:
        tail_weight: factor on tokens beyond the length of the shorter answer (LD-DPO, Liu et al. 2024, arXiv:2409.06411,
            eq. 6); None: 1.
    """
    weights = forward.batch["weights"]
    if tail_weight is not None:
        weights = jnp.where(_beyond_shorter(forward.batch), tail_weight, 1.0) * weights
    return answer_sums(forward.token_logprobs().logprobs * weights, forward.batch)


def _beyond_shorter(batch: Mapping[str, Shaped[Array, "B _"]]) -> Bool[Array, "B T"]:
    """Return which tokens of an answer come after as many as the other answer of the pair has."""
    counted = (batch["weights"] != 0).astype(jnp.float32)
    lengths = answer_lengths(batch)
    shorter = jnp.repeat(jnp.minimum(*lengths), 2, axis=1)  # [B, documents]
    each = jnp.stack(lengths, axis=-1).reshape(shorter.shape)
    before = jnp.cumsum(each, axis=1) - each
    document = jnp.maximum(batch["segment_ids"] - 1, 0)
    number = jnp.cumsum(counted, axis=1) - jnp.take_along_axis(before, document, axis=1)  # from 1, within the answer
    return number > jnp.take_along_axis(shorter, document, axis=1)


def total(values: Float[Array, "B P"], there: Bool[Array, "B P"]) -> Float[Array, ""]:
    """Sum values over the pairs that exist."""
    return jnp.sum(jnp.where(there, values, 0.0))


def pair_totals(
    each: Float[Array, "B P"], lengths: Both, rewards: Both, logps: Both, **more: tuple[Float[Array, ""], Float[Array, ""]]
) -> LossTotals:
    """Return the totals of a loss per pair, with TRL's metrics.

    Args:
        lengths: tokens of each answer; 0 where there is no pair.
        rewards: what the objective takes for the reward of each answer.
        logps: log-probabilities of the answers.
        more: further metrics: a sum and its divisor.
    """
    there = lengths.chosen > 0
    count = jnp.sum(there, dtype=jnp.float32)
    rewards, logps = jax.lax.stop_gradient((rewards, logps))
    means = {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/accuracies": (rewards.chosen > rewards.rejected).astype(jnp.float32),
        "rewards/margins": rewards.chosen - rewards.rejected,
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
    }
    metrics = {name: (total(value, there), count) for name, value in means.items()}
    return LossTotals(total(each, there), count, metrics | more)


def counts(inputs: LossInputs) -> dict[str, Float[Array, ""]]:
    """Count the pairs and the tokens of chosen answers: the statistics of losses that add a mean over tokens."""
    chosen = answer_lengths(inputs.batch).chosen
    return {"pairs": jnp.sum(chosen > 0, dtype=jnp.float32), "tokens": jnp.sum(chosen)}


def mean_over_tokens(sums: Float[Array, "B P"], counts: Mapping[str, Any]) -> Float[Array, "B P"]:
    """Turn sums over the tokens of each pair into values whose mean over all pairs is the mean over all tokens.

    Args:
        counts: `pairs` and `tokens` of all microbatches, `[A]`.
    """
    return sums * jnp.sum(counts["pairs"]) / jnp.maximum(jnp.sum(counts["tokens"]), 1)


def log_sigmoid_loss(margins: Float[Array, "*any"], smoothing: float = 0.0) -> Float[Array, "*any"]:
    """Return `-log sigmoid(margin)`, of which a share `smoothing` takes the pair as flipped."""
    flipped = -jax.nn.log_sigmoid(-margins) * smoothing if smoothing else 0.0
    return -jax.nn.log_sigmoid(margins) * (1 - smoothing) + flipped
