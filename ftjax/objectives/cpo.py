"""Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417): preferences without a reference model, as in TRL's
`CPOTrainer`, with the losses of SimPO (Meng et al. 2024, arXiv:2405.14734) and AlphaPO (arXiv:2501.03884).

Legend: B batch, P pairs of a row.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.config.preference import CpoConfig
from ftjax.data.pairs import Pairs
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import LossInputs, Objective
from ftjax.objectives.preference import (
    Both,
    answer_lengths,
    answer_logprobs,
    counts,
    log_sigmoid_loss,
    mean_over_tokens,
    pair_totals,
    total,
)


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the preference loss of a batch of pairs, plus `cpo_alpha` times the loss of chosen answers."""
    section = inputs.config.objective
    sums, lengths = answer_logprobs(inputs), answer_lengths(inputs.batch)
    margin = section.loss_type in ("simpo", "alphapo")
    logps = sums.divided_by(lengths) if margin or section.loss_type == "ipo" else sums
    kind, gamma = ("sigmoid", section.simpo_gamma) if margin else (section.loss_type, 0.0)
    each, rewards = preference_loss(logps, kind, section.beta, gamma, section.label_smoothing, section.alpha)
    there, more = lengths.chosen > 0, {}
    if alpha := _alpha(section):
        more["nll_loss"] = jax.lax.stop_gradient(-jnp.sum(sums.chosen)), jnp.sum(lengths.chosen)
        more["preference_loss"] = jax.lax.stop_gradient(total(each, there)), jnp.sum(there, dtype=jnp.float32)
        each = each + alpha * mean_over_tokens(-sums.chosen, inputs.statistics)
    return pair_totals(each, lengths, rewards, logps, **more), inputs.auxiliary


def preference_loss(
    logps: Both, loss_type: str, beta: float, gamma: float, smoothing: float, alpha: float
) -> tuple[Float[Array, "B P"], Both]:
    """Return the loss of each pair and the rewards of its answers.

    Args:
        logps: log-probabilities, or their means over tokens.
        loss_type: sigmoid, hinge or ipo.
        gamma: target margin between the rewards.
        alpha: not 0: `(1 - p^-alpha) / alpha` takes the place of log p.
    """
    if alpha:
        logps = Both(*((1 - jnp.exp(-alpha * value)) / alpha for value in logps))
    difference = logps.chosen - logps.rejected
    if loss_type == "hinge":
        each = jax.nn.relu(1 - beta * difference)
    elif loss_type == "ipo":
        each = jnp.square(difference - 1 / (2 * beta))
    else:
        each = log_sigmoid_loss(beta * difference - gamma, smoothing)
    return each, logps.scaled(beta)


def _alpha(section: CpoConfig) -> float:
    return 0.0 if section.loss_type == "alphapo" else section.cpo_alpha


def _derived(section: CpoConfig, means: Mapping[str, float]) -> dict[str, float]:
    """Return the loss of an evaluation with the mean over all tokens, instead of means by batch."""
    if "nll_loss" not in means:
        return {}
    return {"loss": means["preference_loss"] + _alpha(section) * means["nll_loss"]}


OBJECTIVE = Objective(CpoConfig, lambda section: Pairs(), loss, _derived, statistics=counts)
