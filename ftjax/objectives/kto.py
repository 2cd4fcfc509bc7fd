"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): learns from answers that are wanted or not, as in TRL's `KTOTrainer`.

An answer's reward is compared with how far the model has moved from its reference on answers in general: the mean log-ratio of
answers to other prompts (`ftjax.data.unpaired`) over the whole update, at least 0, without a gradient.

Legend: B batch, P rows of data in a row of the batch, A microbatches.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.config.preference import KtoConfig
from ftjax.data.unpaired import Unpaired
from ftjax.objectives.logprobs import segment_sums
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import Forward, LossInputs, Objective
from ftjax.objectives.preference import total


class _Answers(NamedTuple):
    """Values of each document `[B, documents]`; 0 where there is none.

    Attributes:
        label: 1 wanted, -1 unwanted, 0 for the KL divergence.
        reference: log-probability for the reference model.
    """

    label: jax.Array
    logps: jax.Array
    reference: jax.Array
    there: jax.Array  # bool


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the loss of a batch of answers."""
    section, found = inputs.config.objective, _answers(inputs)
    kl = _kl(inputs) if section.loss_type == "kto" else jnp.float32(0)
    ratios = found.logps - found.reference
    wanted, unwanted = found.label > 0, found.label < 0
    if section.loss_type == "kto":
        good = 1 - jax.nn.sigmoid(section.beta * (ratios - kl))
        bad = 1 - jax.nn.sigmoid(section.beta * (kl - ratios))
    else:  # APO-zero, unpaired (arXiv:2408.06266)
        good, bad = 1 - jax.nn.sigmoid(section.beta * ratios), jax.nn.sigmoid(section.beta * ratios)
    each = total(section.desirable_weight * good, wanted) + total(section.undesirable_weight * bad, unwanted)
    good_count, bad_count = (jnp.sum(there, dtype=jnp.float32) for there in (wanted, unwanted))
    metrics = {}
    for name, there, number in (("chosen", wanted, good_count), ("rejected", unwanted, bad_count)):
        metrics[f"rewards/{name}"] = total(section.beta * ratios, there), number
        metrics[f"logps/{name}"] = total(found.logps, there), number
    if section.loss_type == "kto":
        metrics["kl"] = kl * (good_count + bad_count), good_count + bad_count
    return LossTotals(each, good_count + bad_count, jax.lax.stop_gradient(metrics)), inputs.auxiliary


def statistics(inputs: LossInputs) -> dict[str, Float[Array, ""]]:
    """Sum the log-ratios of the documents for the KL divergence, and count them."""
    found = _answers(inputs)
    there = found.there & (found.label == 0)
    return {"kl": total(found.logps - found.reference, there), "count": jnp.sum(there, dtype=jnp.float32)}


def _kl(inputs: LossInputs) -> jax.Array:
    found = inputs.statistics
    return jnp.maximum(jnp.sum(found["kl"]) / jnp.maximum(jnp.sum(found["count"]), 1), 0)


def _answers(inputs: LossInputs) -> _Answers:
    section, segments = inputs.config.objective, inputs.batch["segment_ids"]
    documents = _documents_per_row(segments)

    def sums(values: jax.Array) -> jax.Array:
        return segment_sums(values, segments, documents)

    labels = inputs.batch["labels"].reshape(*segments.shape, -1)
    known = section.precompute_ref_log_probs
    reference = sums(labels[..., 1]) if known else jax.lax.stop_gradient(_logprobs(inputs.reference_after))
    there = sums((inputs.batch["weights"] != 0).astype(jnp.float32)) > 0
    return _Answers(sums(labels[..., 0]), _logprobs(inputs), reference, there)


def _documents_per_row(segments: jax.Array) -> int:
    """Return the most documents that a row may have: each has two tokens at least."""
    return segments.shape[1] // 2


def _logprobs(forward: Forward) -> Float[Array, "B documents"]:
    """Sum the log-probabilities of the answer of each document."""
    segments = forward.batch["segment_ids"]
    values = forward.token_logprobs().logprobs * forward.batch["weights"]
    return segment_sums(values, segments, _documents_per_row(segments))


def _derived(section: KtoConfig, means: Mapping[str, float]) -> dict[str, float]:
    """Return the margin between the rewards of wanted and of unwanted answers."""
    names = "rewards/chosen", "rewards/rejected"
    if not all(name in means for name in names):
        return {}
    return {"rewards/margins": means[names[0]] - means[names[1]]}


OBJECTIVE = Objective(
    KtoConfig,
    lambda section: Unpaired(1 if section.precompute_ref_log_probs else 0, section.loss_type == "kto"),
    loss,
    _derived,
    precomputed=lambda section: _logprobs if section.precompute_ref_log_probs else None,
    reference=lambda section: not section.precompute_ref_log_probs,
    statistics=statistics,
)
