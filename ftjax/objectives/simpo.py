"""SimPO (Meng et al. 2024, arXiv:2405.14734): the mean log-probability of an answer's tokens is its reward.

There is no reference model. It is TRL's `CPOTrainer` with `loss_type: simpo` and `cpo_alpha: 0`.
"""

from jaxtyping import Array, Float

from ftjax.config.preference import SimpoConfig
from ftjax.data.pairs import Pairs
from ftjax.objectives.cpo import preference_loss
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import LossInputs, Objective
from ftjax.objectives.preference import answer_lengths, answer_logprobs, pair_totals


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the loss of a batch of pairs."""
    section, lengths = inputs.config.objective, answer_lengths(inputs.batch)
    logps = answer_logprobs(inputs).divided_by(lengths)
    each, rewards = preference_loss(logps, "sigmoid", section.beta, section.simpo_gamma, section.label_smoothing, section.alpha)
    return pair_totals(each, lengths, rewards, logps), inputs.auxiliary


OBJECTIVE = Objective(SimpoConfig, lambda section: Pairs(), loss)
