"""Distillation: the model, a student, learns to predict what a teacher predicts (Hinton et al. 2015, arXiv:1503.02531; Agarwal
et al. 2024, "GKD", arXiv:2306.13649, eq. 1), as in TRL's `DistillationTrainer` and `GKDTrainer`.

For each trained token, with `p` of the teacher and `q` of the student over the vocabulary, both at `temperature`:

    beta 0            KL(p || q)                  forward: the student covers whatever the teacher finds likely
    beta 1            KL(q || p)                  reverse: the student keeps to what the teacher finds likely
    between           beta KL(p || m) + (1 - beta) KL(q || m)   with m = beta p + (1 - beta) q

Both models' hidden states are computed for the whole batch, and their logits for `loss_chunk` tokens at a time. Gradients flow
to the student alone. Ids that only one of the two models has, which pad its vocabulary, are left out of both distributions. A
teacher with another tokenizer is compared in `ftjax.objectives.uld`.

Legend: B batch, T length, C tokens of a chunk, V vocab, k likely tokens of a teacher.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.config.distill import DistillConfig
from ftjax.data.encoding import Answers, RowEncoding
from ftjax.data.predictions import width_of
from ftjax.data.rollout import AlignedPromptTokens, AlignedTokens, AnsweredTokens, PromptTokens, TaughtTokens
from ftjax.objectives import uld
from ftjax.objectives.divergence import NOTHING, divergence, log_probabilities
from ftjax.objectives.logprobs import per_token
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import Forward, LossInputs, Objective
from ftjax.objectives.projection import Projection
from ftjax.objectives.sft import perplexity


class Lesson(NamedTuple):
    """What a chunk of tokens is compared with.

    Attributes:
        tokens: the token that follows each.
        own: 1 where it is one of the data's, 0 where the student generated it.
        hidden: hidden states of the teacher.
    """

    tokens: Int[Array, "B C"]
    own: Float[Array, "B C"]
    hidden: Float[Array, "B C E"]


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the loss of a batch."""
    section, batch, teacher = inputs.config.objective, inputs.batch, inputs.teacher
    if teacher is None:
        return _of_predictions(inputs), inputs.auxiliary
    if section.use_uld_loss:
        return uld.totals(inputs), inputs.auxiliary
    own = batch["labels"] if section.mixed and "labels" in batch else jnp.full(batch["weights"].shape, float(section.lmbda < 1))
    lesson = Lesson(batch["targets"], own, jax.lax.stop_gradient(teacher.after(inputs.hidden).hidden))
    return inputs.token_totals(lesson, partial(_measure, section, teacher.output)), inputs.auxiliary


def _of_predictions(inputs: LossInputs) -> LossTotals:
    """Compute the loss from predictions that were written before: of the likeliest tokens, and of all others as one outcome."""
    batch, section = inputs.batch, inputs.config.objective
    found, k = batch["labels"].reshape(*batch["weights"].shape, -1), section.loss_top_k
    ids = found[..., :k].astype(jnp.int32)
    return inputs.token_totals((batch["targets"], ids, found[..., k:]), partial(_measure_likely, section))


def _measure_likely(
    section: DistillConfig, logits: Float[Array, "B C V"], lesson: tuple[jax.Array, jax.Array, jax.Array],
    weights: Float[Array, "B C"],
) -> LossTotals:  # fmt: skip
    tokens, ids, wanted = lesson
    scaled = logits / section.temperature
    student = likely(scaled, ids)
    return totals(section, logits, tokens, jnp.ones_like(weights), weights, student, jnp.maximum(wanted, NOTHING))


def likely(logits: Float[Array, "*of V"], ids: Int[Array, "*of k"]) -> Float[Array, "*of outcomes"]:
    """Return the log-probabilities of these ids, and that of all others together."""
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, ids, axis=-1)
    others = jnp.put_along_axis(logits, ids, NOTHING, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    return jnp.maximum(jnp.concatenate([picked, rest], axis=-1) - normaliser, NOTHING)


def predictions(forward: Forward, top_k: int, temperature: float, vocabulary: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return a teacher's predictions for each token: the likeliest ids `[B, T, k]`, their log-probabilities, and that of all
    other ids `[B, T]`.

    Args:
        vocabulary: ids that count.
    """
    output, shape = forward.output, forward.batch["weights"].shape
    of = partial(_likeliest, top_k, temperature, vocabulary)
    tokens = forward.hidden, forward.batch["targets"], forward.batch["weights"]
    return per_token(output.unembed, output.arrange, of, forward.chunk_length(shape), False, output.trained, *tokens)


def _likeliest(
    top_k: int, temperature: float, vocabulary: int, logits: Float[Array, "B C V"], targets: Int[Array, "B C"],
    keep: Float[Array, "B C"],
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    logits = logits[..., :vocabulary] / temperature
    ids = jax.lax.top_k(logits, top_k)[1]
    found = likely(logits, ids)
    return ids, found[..., :-1], found[..., -1]


def _measure(
    section: DistillConfig, teacher: Projection, logits: Float[Array, "B C V"], lesson: Lesson, weights: Float[Array, "B C"]
) -> LossTotals:
    """Sum the losses of a chunk of tokens."""
    wanted = teacher.unembed(teacher.trained, lesson.hidden)
    shared = min(logits.shape[-1], wanted.shape[-1])
    student, wanted = (log_probabilities(x[..., :shared], section.temperature) for x in (logits, wanted))
    found = totals(section, logits, lesson.tokens, lesson.own, weights, student, jax.lax.stop_gradient(wanted))
    entropy = -jnp.sum(jnp.exp(student) * student, axis=-1)
    return found._replace(metrics={**found.metrics, "entropy": (jnp.sum(entropy * weights), jnp.sum(weights))})


def totals(
    section: DistillConfig, logits: Float[Array, "B C V"], tokens: Int[Array, "B C"], own: Float[Array, "B C"],
    weights: Float[Array, "B C"], student: Float[Array, "B C outcomes"], teacher: Float[Array, "B C outcomes"],
) -> LossTotals:  # fmt: skip
    """Sum divergence and cross-entropy.

    Args:
        logits: of the student.
        tokens, own: see `Lesson`.
        student, teacher: log-probabilities of the outcomes that are compared.
    """
    each, weight = divergence(student, teacher, section.beta), jnp.sum(weights)
    apart = jnp.sum(each * weights)
    metrics = {"divergence": (apart, weight)}
    total = section.distillation_weight * apart
    if section.lmbda < 1:
        picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        cross_entropy = jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights * own)
        metrics["cross_entropy"] = cross_entropy, jnp.sum(weights * own)
        if section.crossentropy_weight:
            total = total + section.crossentropy_weight * cross_entropy
    return LossTotals(total, weight, metrics)


def _encoding(section: DistillConfig) -> RowEncoding:
    if section.use_uld_loss:
        return AlignedPromptTokens(section.max_completion_length) if section.lmbda == 1 else AlignedTokens(mixed=section.mixed)
    if section.lmbda == 1:
        return PromptTokens(section.max_completion_length)
    if section.teacher_logprobs is not None:
        return TaughtTokens(width=width_of(section.loss_top_k))
    return AnsweredTokens() if section.mixed else Answers()


def _teacher(section: DistillConfig) -> tuple[str, str | None] | None:
    if section.teacher_logprobs is not None:
        return None
    return section.teacher_model_name_or_path, section.teacher_model_revision


def _counts(inputs: LossInputs) -> jax.Array:
    """Return what `ftjax.objectives.uld` needs of all microbatches."""
    return uld.counts(inputs.batch) if inputs.config.objective.use_uld_loss else jnp.zeros(2)


def _derived(section: DistillConfig, means: Mapping[str, float]) -> dict[str, float]:
    """Return the perplexity on answers of the data."""
    return perplexity(means["cross_entropy"]) if "cross_entropy" in means else {}


OBJECTIVE = Objective(
    DistillConfig,
    _encoding,
    loss,
    _derived,
    teacher=_teacher,
    statistics=_counts,
    generates=lambda section: section.on_policy,
)
