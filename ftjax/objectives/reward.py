"""Reward models: a score for a conversation, trained so that chosen answers score higher than rejected ones (Bradley and Terry
1952; Ouyang et al. 2022, arXiv:2203.02155), as in TRL's `RewardTrainer`.

The model is transformers' `AutoModelForSequenceClassification` with one output.

Legend: B batch, T length, P pairs of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.config.preference import RewardConfig
from ftjax.data.scored import Scored
from ftjax.models.classifier import REGRESSION
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import Head, LossInputs, Objective
from ftjax.objectives.preference import answer_lengths, answer_sums, total


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the loss of a batch of pairs, `-log sigmoid(chosen - rejected - margin)`."""
    section, batch = inputs.config.objective, inputs.batch
    scores = answer_sums(inputs.scores()[..., 0] * batch["weights"], batch)
    margins = answer_sums(batch["labels"], batch).chosen
    there = answer_lengths(batch).chosen > 0
    difference = scores.chosen - scores.rejected
    each = -jax.nn.log_sigmoid(difference - margins)
    if section.center_rewards_coefficient:
        each = each + section.center_rewards_coefficient * jnp.square(scores.chosen + scores.rejected)
    count = jnp.sum(there, dtype=jnp.float32)
    means = {
        "accuracy": (scores.chosen > scores.rejected).astype(jnp.float32),
        "margin": difference,
        "mean_reward": (scores.chosen + scores.rejected) / 2,
    }
    metrics = {name: (total(jax.lax.stop_gradient(value), there), count) for name, value in means.items()}
    return LossTotals(total(each, there), count, metrics), inputs.auxiliary


OBJECTIVE = Objective(RewardConfig, lambda section: Scored(), loss, head=lambda section: Head(("LABEL_0",), REGRESSION))
