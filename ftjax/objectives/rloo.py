"""RLOO (Ahmadian et al. 2024, arXiv:2402.14740), as in TRL's `RLOOTrainer`: policy gradients of whole answers.

The advantage of an answer is its reward minus the mean reward of the other answers to the prompt; the KL divergence from the
reference model is part of the reward, so that the loss itself needs no reference.

Legend: B batch, T length, D answers of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.config.rewards import RlooConfig
from ftjax.data.rollout import RolloutTokens
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import LossInputs, Objective
from ftjax.objectives.rollouts import answer_sums, answers_of, counts, logprob_gap, warning


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the loss of a batch of answers."""
    section, found, batch = inputs.config.objective, answers_of(inputs), inputs.batch
    low, high = section.bounds
    mask = found.mask.astype(jnp.float32)
    lengths = answer_sums(mask, batch)
    advantages = answer_sums(found.advantages * mask, batch) / jnp.maximum(lengths, 1)
    ratio = jnp.exp(answer_sums(jnp.where(found.mask, found.logprobs - found.old, 0.0), batch))
    each = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
    there = lengths > 0
    too_low, too_high = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    answers = counts(inputs)["answers"]
    metrics = {"entropy": (jnp.sum(found.entropy * mask), jnp.sum(mask)), **logprob_gap(found)}
    for name, which in (("low", too_low), ("high", too_high), ("region", too_low | too_high)):
        metrics[f"clip_ratio/{name}_mean"] = jnp.sum(which & there, dtype=jnp.float32), answers
    return LossTotals(jnp.sum(jnp.where(there, each, 0.0)), answers, jax.lax.stop_gradient(metrics)), inputs.auxiliary


OBJECTIVE = Objective(
    RlooConfig,
    lambda section: RolloutTokens(section.max_completion_length),
    loss,
    reference=lambda section: section.beta > 0,  # for the rewards
    warning=warning,
    generates=lambda section: True,
)
