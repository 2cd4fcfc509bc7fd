"""GRPO (Shao et al. 2024, arXiv:2402.03300) and its relatives, as in TRL's `GRPOTrainer`.

Answers that the model has generated are made more or less likely by their advantages, while the ratio of their probability to
that when they were generated is held near 1. `loss_type` says how, and what the losses are averaged over:

    grpo     ratio clipped; the mean of each answer's tokens, then the mean over answers
    bnpo     ratio clipped; the mean over all tokens of an update
    dr_grpo  ratio clipped; the sum over tokens by the number of answers times max_completion_length (arXiv:2503.20783)
    dapo     the mean over all tokens of an update, with separate bounds (arXiv:2503.14476)
    cispo    the ratio is a bounded factor without a gradient, on log-probabilities (arXiv:2506.13585)
    sapo     a sigmoid of the ratio takes the place of clipping (arXiv:2511.20347)
    luspo    ratio clipped; the sum of each answer's tokens, then the mean over answers
    vespo    the ratio of a whole answer, weighted by a gamma density (arXiv:2602.10693)

With `importance_sampling_level: sequence` the ratio is the geometric mean over an answer's tokens (GSPO, arXiv:2507.18071).

Legend: B batch, T length, D answers of a row.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ftjax.config.rewards import CLIPPED, GrpoConfig
from ftjax.data.rollout import RolloutTokens
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import LossInputs, Objective
from ftjax.objectives.rollouts import (
    Answers,
    answer_sums,
    answers_of,
    count,
    counts,
    logprob_gap,
    reference_logprobs,
    spread,
    warning,
)

SMALLEST = math.log(1e-8)  # of the log-ratios of vespo
LARGEST = 20.0


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the loss of a batch of answers."""
    section, found = inputs.config.objective, answers_of(inputs)
    mask = found.mask.astype(jnp.float32)
    lengths = answer_sums(mask, inputs.batch)
    ratio = jnp.exp(_log_ratio(inputs, found, lengths))
    each, metrics = _policy_loss(inputs, found, ratio, lengths)
    chosen = mask
    if section.top_entropy_quantile < 1:
        chosen = mask * _uncertain(inputs, found)
        each = each * chosen
    if section.importance_sampling_correction and section.loss_type != "vespo":
        each = each * _correction(inputs, found)
    if section.off_policy_mask_threshold is not None:
        each = each * _kept(inputs, found, lengths)
    if section.beta:
        difference = reference_logprobs(inputs, found.logprobs) - found.logprobs
        kl = jnp.exp(difference) - difference - 1
        if section.use_bias_correction_kl:
            kl = kl * ratio
        each = each + section.beta * kl
        metrics["kl"] = _mean_over_tokens(kl, mask)
    total, weight = _average(inputs, each * mask, lengths)
    if section.entropy_coef:
        bonus = jnp.sum(found.entropy * chosen) / _chosen_tokens(inputs)
        total = total - section.entropy_coef * bonus * _weight_of_update(inputs)
    metrics["entropy"] = _mean_over_tokens(found.entropy, mask)
    metrics |= logprob_gap(found)
    return LossTotals(total, weight, jax.lax.stop_gradient(metrics)), inputs.auxiliary


def statistics(inputs: LossInputs) -> dict[str, Float[Array, "..."]]:
    """Count answers and tokens; with `top_entropy_quantile` also return the entropies, whose quantile is that of an update."""
    if inputs.config.objective.top_entropy_quantile == 1:
        return counts(inputs)
    found = answers_of(inputs)
    return counts(inputs) | {"entropies": jnp.where(found.mask, found.entropy, jnp.nan)}


# ---- ratios ----


def _log_ratio(inputs: LossInputs, found: Answers, lengths: Float[Array, "B D"]) -> Float[Array, "B T"]:
    """Return the log-ratio of each token to the policy that generated it; that of its answer at the sequence level."""
    ratio = jnp.where(found.mask, found.logprobs - found.old, 0.0)
    if inputs.config.objective.importance_sampling_level == "token":
        return ratio
    return spread(answer_sums(ratio, inputs.batch) / jnp.maximum(lengths, 1), inputs.batch)


def _policy_loss(
    inputs: LossInputs, found: Answers, ratio: Float[Array, "B T"], lengths: Float[Array, "B D"]
) -> tuple[Float[Array, "B T"], dict[str, tuple[jax.Array, jax.Array]]]:
    """Return the loss of each token, and metrics of what was clipped."""
    section, advantages = inputs.config.objective, found.advantages
    low, high = section.bounds
    mask = found.mask.astype(jnp.float32)
    if section.loss_type in CLIPPED:
        free = ratio if section.delta is None else jnp.minimum(ratio, section.delta)
        each = -jnp.minimum(free * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
        too_low, too_high = (free < 1 - low) & (advantages < 0), (free > 1 + high) & (advantages > 0)
        clipped = {"low": too_low, "high": too_high, "region": too_low | too_high}
        return each, {f"clip_ratio/{name}_mean": _share(inputs, value, mask, lengths) for name, value in clipped.items()}
    if section.loss_type == "cispo":
        factor = jax.lax.stop_gradient(jnp.minimum(ratio, high))
        clipped = (ratio > high) & (advantages > 0)
        return -factor * advantages * found.logprobs, {"cispo_clip_ratio": _share(inputs, clipped, mask, lengths)}
    if section.loss_type == "sapo":
        heat = jnp.where(advantages > 0, section.sapo_temperature_pos, section.sapo_temperature_neg)
        return -jax.nn.sigmoid(heat * (ratio - 1)) * 4 / heat * advantages, {}
    weights = _gamma_weights(inputs, found)
    there = jnp.arange(weights.shape[1]) < jnp.max(inputs.batch["segment_ids"], axis=1, keepdims=True)
    there = there.astype(jnp.float32)
    each = -spread(weights, inputs.batch) * advantages * found.logprobs
    return each, {"vespo/phi_seq_mean": (jnp.sum(weights * there), jnp.sum(there))}


def _gamma_weights(inputs: LossInputs, found: Answers) -> Float[Array, "B D"]:
    """Return the weight of each answer in `vespo`: `e^l w^k e^(-l w)` of its ratio `w`, without a gradient."""
    section, batch = inputs.config.objective, inputs.batch
    logs = jnp.where(found.mask, jnp.clip(found.logprobs - found.old, -LARGEST, LARGEST), 0.0)
    sums = answer_sums(logs, batch)
    if section.importance_sampling_correction:
        correction = jnp.clip(jnp.log(_correction(inputs, found)), SMALLEST, LARGEST)
        if section.importance_sampling_correction.startswith("sequence"):  # one factor for the whole answer
            lengths = answer_sums(found.mask.astype(jnp.float32), batch)
            correction = correction / jnp.maximum(spread(lengths, batch), 1)
        sums = sums + answer_sums(jnp.where(found.mask, correction, 0.0), batch)
    logs = jnp.clip(sums, SMALLEST, LARGEST)
    lengths = jnp.maximum(answer_sums(found.mask.astype(jnp.float32), batch), 1)
    good = answer_sums(jnp.where(found.mask, found.advantages, 0.0), batch) / lengths >= 0
    power = jnp.where(good, section.vespo_k_pos, section.vespo_k_neg)
    decay = jnp.maximum(jnp.where(good, section.vespo_lambda_pos, section.vespo_lambda_neg), 1e-4)
    value = jnp.exp(decay + power * logs - decay * jnp.exp(logs))
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(value), value, 0.0))


def _correction(inputs: LossInputs, found: Answers) -> Float[Array, "B T"]:
    """Return the factor that corrects for a sampler whose probabilities are not the trainer's."""
    section = inputs.config.objective
    level, how = section.importance_sampling_correction.split("_")
    logs = jnp.where(found.mask, jax.lax.stop_gradient(found.old) - found.sampler, 0.0)
    if level == "sequence":
        logs = spread(answer_sums(logs, inputs.batch), inputs.batch)
    ratio, low, high = jnp.exp(logs), section.importance_sampling_clip_min, section.importance_sampling_clip_max
    if how == "truncate":
        return jnp.clip(ratio, low, high)
    outside = (ratio < (-jnp.inf if low is None else low)) | (ratio > (jnp.inf if high is None else high))
    return jnp.where(outside, 0.0, ratio)


def _kept(inputs: LossInputs, found: Answers, lengths: Float[Array, "B D"]) -> Float[Array, "B T"]:
    """Return 0 for the tokens of bad answers that are far from the sampling policy (arXiv:2512.02556, eq. 9)."""
    section = inputs.config.objective
    behind = found.sampler if section.importance_sampling_correction else found.old
    logs = jnp.where(found.mask, behind - jax.lax.stop_gradient(found.logprobs), 0.0)
    mean = answer_sums(logs, inputs.batch) / jnp.maximum(lengths, 1)
    near = spread(mean, inputs.batch) <= section.off_policy_mask_threshold
    return ((found.advantages >= 0) | near).astype(jnp.float32)


def _uncertain(inputs: LossInputs, found: Answers) -> Float[Array, "B T"]:
    """Return 1 for the tokens whose entropy is among the highest of the update (arXiv:2506.01939)."""
    least = jnp.nanquantile(inputs.statistics["entropies"], 1 - inputs.config.objective.top_entropy_quantile)
    return (jax.lax.stop_gradient(found.entropy) >= least).astype(jnp.float32)


# ---- means ----


def _average(
    inputs: LossInputs, each: Float[Array, "B T"], lengths: Float[Array, "B D"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of the losses and what it is divided by."""
    kind, own = inputs.config.objective.loss_type, counts(inputs)
    if kind in ("grpo", "sapo"):
        return jnp.sum(answer_sums(each, inputs.batch) / jnp.maximum(lengths, 1)), own["answers"]
    if kind == "luspo":
        return jnp.sum(each), own["answers"]
    if kind == "dr_grpo":
        return jnp.sum(each), own["answers"] * inputs.config.objective.max_completion_length
    return jnp.sum(each), own["tokens"]


def _weight_of_update(inputs: LossInputs) -> Float[Array, ""]:
    """Return what the sum of an update is divided by, so that a mean over tokens can be a part of it."""
    section = inputs.config.objective
    if section.loss_type in ("grpo", "sapo", "luspo"):
        return count(inputs.statistics, "answers")
    if section.loss_type == "dr_grpo":
        return count(inputs.statistics, "answers") * section.max_completion_length
    return count(inputs.statistics, "tokens")


def _chosen_tokens(inputs: LossInputs) -> Float[Array, ""]:
    """Return the number of tokens of the update that the entropy bonus is a mean over."""
    section, found = inputs.config.objective, inputs.statistics
    if section.top_entropy_quantile == 1:
        return count(found, "tokens")
    least = jnp.nanquantile(found["entropies"], 1 - section.top_entropy_quantile)
    return jnp.maximum(jnp.sum(found["entropies"] >= least), 1).astype(jnp.float32)


def _mean_over_tokens(values: Float[Array, "B T"], mask: Float[Array, "B T"]) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(values * mask), jnp.sum(mask)


def _share(
    inputs: LossInputs, which: Bool[Array, "B T"], mask: Float[Array, "B T"], lengths: Float[Array, "B D"]
) -> tuple[jax.Array, jax.Array]:
    """Count tokens, or answers where the ratio is that of an answer."""
    if inputs.config.objective.importance_sampling_level == "token":
        return _mean_over_tokens(which.astype(jnp.float32), mask)
    share = answer_sums(which.astype(jnp.float32) * mask, inputs.batch) / jnp.maximum(lengths, 1)
    return jnp.sum(share), counts(inputs)["answers"]


OBJECTIVE = Objective(
    GrpoConfig,
    lambda section: RolloutTokens(section.max_completion_length),
    loss,
    reference=lambda section: section.beta > 0,
    statistics=statistics,
    warning=warning,
    generates=lambda section: True,
)
