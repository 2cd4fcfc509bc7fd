"""Direct preference optimisation and its relatives (Rafailov et al. 2023, arXiv:2305.18290), as in TRL's `DPOTrainer`.

The reward of an answer is how much likelier the model makes it than the reference model does, `beta * (log p - log p_ref)`
summed over its tokens; the losses compare the rewards of the chosen and the rejected answer. Both answers of all pairs go
through the model in one pass, as segments of packed rows.

Legend: B batch, P pairs of a row, A microbatches.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ftjax.config.preference import DpoConfig
from ftjax.data.pairs import Pairs
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import Forward, LossInputs, Objective
from ftjax.objectives.preference import (
    Both,
    answer_lengths,
    answer_logprobs,
    answer_sums,
    counts,
    log_sigmoid_loss,
    mean_over_tokens,
    pair_totals,
)

SORTED = ("aot", "aot_unpaired")  # compare the pairs of a whole update in order of their log-ratios


@dataclass(frozen=True)
class Scores:
    """What the losses of a batch are computed from; arrays are `[B, P]`.

    Attributes:
        section: the settings.
        logps: log-probabilities of the answers.
        reference: those of the reference model.
        ratios: their differences.
        scores: the ratios, or what another f-divergence makes of them.
        lengths: tokens of the answers; 0 where there is no pair.
        statistics: of all microbatches, `[A, ...]` (`statistics`).
        number: the index of this microbatch.
    """

    section: DpoConfig
    logps: Both
    reference: Both
    ratios: Both
    scores: Both
    lengths: Both
    statistics: Mapping[str, Any]
    number: jax.Array | int

    @property
    def margin(self) -> Float[Array, "B pairs"]:
        """Difference of the rewards."""
        return self.section.beta * (self.scores.chosen - self.scores.rejected)

    @property
    def mean_margin(self) -> Float[Array, "B pairs"]:
        """Difference of the scores per token."""
        means = self.scores.divided_by(self.lengths)
        return means.chosen - means.rejected

    @property
    def rewards(self) -> Both:
        return self.ratios.scaled(self.section.beta)


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the loss of a batch of pairs: the weighted sum of the losses in `loss_type`."""
    section = inputs.config.objective
    logps, reference = _logprobs(inputs)
    lengths = answer_lengths(inputs.batch)
    ratios = logps - reference
    scores = Both(*(_divergence(section, ratio) for ratio in ratios))
    found = Scores(section, logps, reference, ratios, scores, lengths, inputs.statistics, inputs.number)
    each, more = 0.0, {}
    for name, weight in section.weighted_losses:
        if name == "sft":
            losses = -answer_sums(inputs.token_logprobs().logprobs * inputs.batch["weights"], inputs.batch).chosen
            more["nll_loss"] = jax.lax.stop_gradient(jnp.sum(losses)), jnp.sum(lengths.chosen)
            term = mean_over_tokens(losses, inputs.statistics)
        else:
            term = LOSSES[name](found)
        each = each + weight * term
        if len(section.loss_type) > 1:
            more |= _part(name, term, lengths)
    return pair_totals(each, lengths, found.rewards, logps, **more), inputs.auxiliary


def statistics(inputs: LossInputs) -> dict[str, Any]:
    """Return what the losses of an update need from all of its microbatches: counts, and the log-ratios that `aot` sorts."""
    found: dict[str, Any] = counts(inputs)
    if set(SORTED) & set(inputs.config.objective.loss_type):
        logps, reference = _logprobs(inputs)
        found |= {"logps": logps, "reference": reference, "there": answer_lengths(inputs.batch).chosen > 0}
    return found


def _logprobs(inputs: LossInputs) -> tuple[Both, Both]:
    """Return the log-probabilities of the answers for the model and for its reference."""
    section = inputs.config.objective
    logps = answer_logprobs(inputs, section.ld_alpha)
    if section.precompute_ref_log_probs:
        return logps, answer_sums(inputs.batch["labels"], inputs.batch)
    if inputs.reference is None:
        return logps, Both(*map(jnp.zeros_like, logps))
    return logps, Both(*jax.lax.stop_gradient(answer_logprobs(inputs.reference_after, section.ld_alpha)))


def _documents(section: DpoConfig, forward: Forward) -> Float[Array, "B documents"]:
    """Return the log-probability of the answer of each document."""
    pairs = answer_logprobs(forward, section.ld_alpha)
    return jnp.stack(pairs, axis=-1).reshape(pairs.chosen.shape[0], -1)


def _part(name: str, term: jax.Array, lengths: Both) -> dict[str, tuple[jax.Array, jax.Array]]:
    there = lengths.chosen > 0
    value = jax.lax.stop_gradient(jnp.sum(jnp.where(there, term, 0.0)))
    return {f"loss/{name}": (value, jnp.sum(there, dtype=jnp.float32))}


def _divergence(section: DpoConfig, ratio: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Return f'(p / p_ref) of the log-ratio, up to a constant (f-DPO, Wang et al. 2023, arXiv:2309.16240)."""
    alpha = section.f_alpha_divergence_coef
    match section.f_divergence_type:
        case "forward_kl":
            return 1 - jnp.exp(-ratio)
        case "js_divergence":
            return math.log(2) + jax.nn.log_sigmoid(ratio)
        case "alpha_divergence" if abs(alpha - 1) >= 1e-6:
            return (jnp.exp(jnp.minimum((alpha - 1) * ratio, 80.0)) - 1) / (alpha - 1)  # e^80 is finite in float32
    return ratio


# ---- the losses ----


def _sigmoid(s: Scores) -> Float[Array, "B P"]:
    return -jax.nn.log_sigmoid(s.margin)


def _sigmoid_norm(s: Scores) -> Float[Array, "B P"]:
    return -jax.nn.log_sigmoid(s.section.beta * s.mean_margin)


def _hinge(s: Scores) -> Float[Array, "B P"]:
    """Zhao et al. 2023 (arXiv:2305.10425)."""
    return jax.nn.relu(1 - s.margin)


def _ipo(s: Scores) -> Float[Array, "B P"]:
    """Azar et al. 2023 (arXiv:2310.12036, eq. 17), on means over tokens, as its authors do."""
    return jnp.square(s.mean_margin - 1 / (2 * s.section.beta))


def _exo_pair(s: Scores) -> Float[Array, "B P"]:
    """Ji et al. 2024 (arXiv:2402.00856, eq. 16)."""
    smoothing = s.section.label_smoothing
    won, lost = jax.nn.log_sigmoid(s.margin), jax.nn.log_sigmoid(-s.margin)
    return jnp.exp(won) * (won - math.log1p(-smoothing)) + jnp.exp(lost) * (lost - math.log(smoothing))


def _nca_pair(s: Scores) -> Float[Array, "B P"]:
    """Chen et al. 2024 (arXiv:2402.05369)."""
    rewards = s.rewards
    both = jax.nn.log_sigmoid(-rewards.chosen) + jax.nn.log_sigmoid(-rewards.rejected)
    return -jax.nn.log_sigmoid(rewards.chosen) - 0.5 * both


def _robust(s: Scores) -> Float[Array, "B P"]:
    """Chowdhury et al. 2024 (arXiv:2403.00409)."""
    flipped = s.section.label_smoothing
    right, wrong = (1 - flipped) * jax.nn.log_sigmoid(s.margin), flipped * jax.nn.log_sigmoid(-s.margin)
    return (wrong - right) / (1 - 2 * flipped)


def _bco_pair(s: Scores) -> Float[Array, "B P"]:
    """Jung et al. 2024 (arXiv:2404.04656)."""
    return -jax.nn.log_sigmoid(s.rewards.chosen) - jax.nn.log_sigmoid(-s.rewards.rejected)


def _sppo_hard(s: Scores) -> Float[Array, "B P"]:
    """Wu et al. 2024 (arXiv:2405.00675, eq. 4.7), with probabilities 1 and 0."""
    goal = 0.5 / s.section.beta
    return jnp.square(s.ratios.chosen - goal) + jnp.square(s.ratios.rejected + goal)


def _apo_zero(s: Scores) -> Float[Array, "B P"]:
    """D'Oosterlinck et al. 2024 (arXiv:2408.06266, eq. 7)."""
    return 1 - jax.nn.sigmoid(s.rewards.chosen) + jax.nn.sigmoid(s.rewards.rejected)


def _apo_down(s: Scores) -> Float[Array, "B P"]:
    """D'Oosterlinck et al. 2024 (arXiv:2408.06266, eq. 8)."""
    rewards = s.rewards
    return jax.nn.sigmoid(rewards.chosen) + 1 - jax.nn.sigmoid(rewards.chosen - rewards.rejected)


def _discopop(s: Scores) -> Float[Array, "B P"]:
    """Lu et al. 2024 (arXiv:2406.08414, eq. 5)."""
    mix = jax.nn.sigmoid(s.margin / s.section.discopop_tau)
    return -jax.nn.log_sigmoid(s.margin) * (1 - mix) + jnp.exp(-s.margin) * mix


def _aot(s: Scores) -> Float[Array, "B P"]:
    """Compare the k-th smallest log-ratio of the model with the k-th of the reference (Melnyk et al. 2024, arXiv:2406.05882).

    The order is that of all pairs of an update, whatever microbatch they are in.
    """
    logps, reference, there = (s.statistics[name] for name in ("logps", "reference", "there"))
    own = _own_ranks(logps.chosen - logps.rejected, there, s.number)
    other = _ordered(reference.chosen - reference.rejected, there)[own]
    return log_sigmoid_loss(s.section.beta * (s.logps.chosen - s.logps.rejected - other), s.section.label_smoothing)


def _aot_unpaired(s: Scores) -> Float[Array, "B P"]:
    """Compare the k-th smallest log-ratio of the chosen answers with the k-th of the rejected ones."""
    logps, reference, there = (s.statistics[name] for name in ("logps", "reference", "there"))
    all_ratios = logps - reference
    chosen, rejected = (_ordered(ratio, there) for ratio in all_ratios)
    ranks = Both(*(_own_ranks(ratio, there, s.number) for ratio in all_ratios))

    def compare(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        return log_sigmoid_loss(s.section.beta * (chosen - rejected), s.section.label_smoothing)

    # Each comparison has a side of this microbatch and one of any: both sides get their gradient, and each comparison counts
    # half for either side.
    both = compare(s.ratios.chosen, rejected[ranks.chosen]) + compare(chosen[ranks.rejected], s.ratios.rejected)
    return both - jax.lax.stop_gradient(both) / 2


def _ordered(values: Float[Array, "A B P"], there: Bool[Array, "A B P"]) -> Float[Array, " A*B*P"]:
    """Sort the values of all pairs; those that do not exist come last."""
    return jnp.sort(jnp.where(there, values, jnp.inf).reshape(-1))


def _own_ranks(values: Float[Array, "A B P"], there: Bool[Array, "A B P"], number: Int[Array, ""] | int) -> Int[Array, "B P"]:
    """Return the place of each value of microbatch `number` among all values, each place once.

    A pair that does not exist gets place 0, so that nothing computed from it is infinite.
    """
    order = jnp.argsort(jnp.where(there, values, jnp.inf).reshape(-1), stable=True)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    return jnp.where(there, places.reshape(there.shape), 0)[number]


LOSSES: dict[str, Callable[[Scores], jax.Array]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}


def _derived(section: DpoConfig, means: Mapping[str, float]) -> dict[str, float]:
    """Return the loss of an evaluation with the mean over all tokens of its `sft` part, instead of means by batch."""
    if "sft" not in section.loss_type or "nll_loss" not in means:
        return {}
    parts = {f"loss/{name}": weight for name, weight in section.weighted_losses if name != "sft"}
    weight = sum(weight for name, weight in section.weighted_losses if name == "sft")
    return {"loss": sum(weight * means[name] for name, weight in parts.items()) + weight * means["nll_loss"]}


FALL = 2.0  # nats by which a chosen answer has become less likely, on average


def warning(section: DpoConfig, means: Mapping[str, float]) -> str | None:
    """Return a warning if chosen answers become less likely while the margin grows, which is how DPO usually goes wrong.

    Without a reference nothing tells how likely they were, and `apo_down` wants them less likely.
    """
    if section.reference_free or "apo_down" in section.loss_type:
        return None
    fall = -means.get("rewards/chosen", 0.0) / section.beta
    if fall < FALL or means.get("rewards/margins", 0.0) <= 0:
        return None
    return (
        f"chosen answers become less likely (by {fall:.1f} nats each on average) while the margin over rejected ones grows "
        f"({means['rewards/margins']:.3g}): the model moves away from both. A lower optimizer.learning_rate, a higher "
        "objective.beta, or objective.loss_type: [sigmoid, sft] may help"
    )


OBJECTIVE = Objective(
    DpoConfig,
    lambda section: Pairs(1 if section.precompute_ref_log_probs else 0),
    loss,
    _derived,
    precomputed=lambda section: partial(_documents, section) if section.precompute_ref_log_probs else None,
    reference=lambda section: not (section.reference_free or section.precompute_ref_log_probs),
    moving=lambda section: (section.ref_model_sync_steps, section.ref_model_mixup_alpha) if section.sync_ref_model else None,
    statistics=statistics,
    warning=warning,
)
