"""Distillation from a teacher with another tokenizer: universal logit distillation (Boizard et al. 2024, arXiv:2402.12030) over
groups of tokens that stand for the same text, as in TRL's `GOLDTrainer` with `uld_token_merge_strategy: bayesian`.

`ftjax.data.align` finds the groups. For the tokens `a b` of a group, a model predicts

    P(v) = p(a) p(v | a)                for every token v in the place of b, the last one

a distribution over its vocabulary, times the probability of the tokens that are written already. Student and teacher are
compared group by group, at `temperature`:

    sorted       sum of |q - p|         over the probabilities of both, each sorted: the likeliest with the likeliest
    hybrid       w_matched D(q, p) + w_unmatched sum of |q - p|
                                        the divergence of `beta` over tokens that both vocabularies have; the others sorted

Sums are averaged over groups. The logits of both exist for `loss_chunk` tokens at a time.

Legend: B batch, T length, C tokens of a chunk, V vocabulary, S vocabulary of the teacher.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ftjax.config.distill import DistillConfig
from ftjax.data.align import VALUES
from ftjax.objectives.divergence import divergence
from ftjax.objectives.logprobs import segment_sums
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import Forward, LossInputs
from ftjax.objectives.projection import Projection

LEAST = math.log(1e-8)  # of a probability, as in TRL


class Alignment(NamedTuple):
    """The teacher's rows and the groups, int32 [B, T]; see `ftjax.data.align`. A place in a row counts from 1."""

    token: Int[Array, "B T"]
    position: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    of: Int[Array, "B T"]
    link: Int[Array, "B T"]
    partner: Int[Array, "B T"]

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any]) -> "Alignment":
        """Read it from the labels of a batch."""
        labels = _labels(batch)[..., : len(VALUES)].astype(jnp.int32)
        return cls(*jnp.moveaxis(labels, -1, 0))


class Lesson(NamedTuple):
    """What a chunk of tokens is compared with.

    Attributes:
        tokens: the token that follows each.
        own: weight of its cross-entropy: 0 where the student generated it.
        imitated: the same as a part of the loss.
        grouped: weight of the group that ends with it; 0 for none.
        hidden: hidden states of the teacher before the end of its group.
        factor: the teacher's log-probability of the group's other tokens.
    """

    tokens: Int[Array, "B C"]
    own: Float[Array, "B C"]
    imitated: Float[Array, "B C"]
    grouped: Float[Array, "B C"]
    hidden: Float[Array, "B C E"]
    factor: Float[Array, "B C"]


def counts(batch: Mapping[str, Any]) -> Float[Array, " 2"]:
    """Return the weight of the groups of a microbatch, and that of its trained tokens."""
    weights = batch["weights"]
    return jnp.stack([jnp.sum(jnp.where(Alignment.of_batch(batch).partner > 0, weights, 0)), jnp.sum(weights)])


def totals(inputs: LossInputs) -> LossTotals:
    """Sum the loss of a microbatch; its weight is that of its groups."""
    section, batch = inputs.config.objective, inputs.batch
    found, weights, length = Alignment.of_batch(batch), batch["weights"], batch["weights"].shape[1]

    def factor(model: Forward, group: jax.Array) -> jax.Array:
        logprobs = model.token_logprobs(group, temperature=section.temperature).logprobs
        return segment_sums(jnp.where(group > 0, jnp.maximum(logprobs, LEAST), 0), group, length)

    own_factor = factor(inputs, found.link)
    teacher = _reading(inputs.teacher, found).after(own_factor)
    teacher_factor = factor(teacher, found.of)
    own = _labels(batch)[..., len(VALUES)] if section.mixed else jnp.full(weights.shape, float(section.lmbda < 1))
    imitated = jnp.zeros_like(weights)
    if section.crossentropy_weight:  # an average over tokens, in a sum that is divided by groups
        groups, tokens = jnp.sum(inputs.statistics, axis=0)
        imitated = section.crossentropy_weight * own * weights * groups / jnp.maximum(tokens, 1e-9)
    before = jnp.maximum(found.partner - 1, 0)[..., None]
    hidden = jnp.take_along_axis(teacher.hidden, before, axis=1)
    grouped = jnp.where(found.partner > 0, weights, 0)
    lesson = Lesson(batch["targets"], own * weights, imitated, grouped, hidden, teacher_factor)
    lesson = jax.tree.map(jax.lax.stop_gradient, lesson)
    return inputs.token_totals(lesson, partial(_measure, section, teacher.output, inputs.matches), own_factor)


def _labels(batch: Mapping[str, Any]) -> Float[Array, "B T values"]:
    return jnp.asarray(batch["labels"]).reshape(*batch["weights"].shape, -1)


def _reading(teacher: Forward, found: Alignment) -> Forward:
    """Return the teacher on its own tokens."""
    following = jnp.roll(found.token, -1, axis=1)
    batch = {"tokens": found.token, "targets": following, "weights": (found.of > 0).astype(jnp.float32)}
    return replace(teacher, batch=batch, ctx=replace(teacher.ctx, positions=found.position, segment_ids=found.segment))


def _measure(
    section: DistillConfig, teacher: Projection, matches: Sequence[tuple[int, int]],
    predicted: tuple[Float[Array, "B C V"], Float[Array, "B C"]], lesson: Lesson, weights: Float[Array, "B C"],
) -> LossTotals:  # fmt: skip
    """Sum the losses of a chunk of tokens."""
    logits, factor = predicted
    wanted = teacher.unembed(teacher.trained, lesson.hidden)
    student, other = (
        jax.nn.log_softmax(x / section.temperature, axis=-1) + by[..., None]
        for x, by in ((logits, factor), (wanted, lesson.factor))
    )
    each, parts = compared(section, student, jax.lax.stop_gradient(other), matches)
    groups = jnp.sum(lesson.grouped)
    metrics = {name: (jnp.sum(value * lesson.grouped), groups) for name, value in {"divergence": each, **parts}.items()}
    total = section.distillation_weight * metrics["divergence"][0]
    if section.lmbda < 1:
        picked = jnp.take_along_axis(logits, lesson.tokens[..., None], axis=-1)[..., 0]
        cross_entropy = jax.nn.logsumexp(logits, axis=-1) - picked
        metrics["cross_entropy"] = jnp.sum(cross_entropy * lesson.own), jnp.sum(lesson.own)
        total = total + jnp.sum(cross_entropy * lesson.imitated)
    return LossTotals(total, groups, metrics)


def compared(
    section: DistillConfig, student: Float[Array, "*of V"], teacher: Float[Array, "*of S"], matches: Sequence[tuple[int, int]]
) -> tuple[Float[Array, "*of"], dict[str, Float[Array, "*of"]]]:
    """Return the loss of each group from log-probabilities, and the parts of a hybrid one.

    Args:
        matches: ids of tokens that both have, `(own, teacher's)`.
    """
    if not section.uld_use_hybrid_loss:
        return _sorted_distance(jnp.exp(student), jnp.exp(teacher)), {}
    own, theirs = (np.array(ids, np.int32) for ids in zip(*matches, strict=True))
    pairs = (jnp.maximum(x[..., ids], LEAST) for x, ids in ((student, own), (teacher, theirs)))
    matched = divergence(*pairs, section.beta)
    rest = [np.setdiff1d(np.arange(x.shape[-1]), ids) for x, ids in ((student, own), (teacher, theirs))]
    unmatched = jnp.zeros_like(matched)
    if all(map(len, rest)):
        unmatched = _sorted_distance(*(jnp.exp(x[..., ids]) for x, ids in zip((student, teacher), rest, strict=True)))
    share = len(own) / teacher.shape[-1]
    by = (share, 1 - share)
    if section.uld_hybrid_matched_weight is not None:
        by = section.uld_hybrid_matched_weight, section.uld_hybrid_unmatched_weight
    return by[0] * matched + by[1] * unmatched, {"matched": matched, "unmatched": unmatched}


def _sorted_distance(p: Float[Array, "*of V"], q: Float[Array, "*of S"]) -> Float[Array, "*of"]:
    """Return the sum of differences of probabilities, each side sorted; the shorter one is filled up with zeros."""
    p, q = (jnp.sort(x, axis=-1, descending=True) for x in (p, q))
    size = max(p.shape[-1], q.shape[-1])
    p, q = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]) for x in (p, q))
    return jnp.sum(jnp.abs(p - q), axis=-1)
