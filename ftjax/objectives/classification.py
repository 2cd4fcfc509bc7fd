"""Sequence classification with a head, read at the last token of each text: one class, several labels, or numbers.

One row of a batch, for the text "Hi there" (ids 12, 57) of the class 2, after BOS (1); the class stands behind the text as one
more token, which a causal model cannot see from there (`ftjax.data.classes`):

    tokens       1  12  57   2        targets     12  57   2   0
    weights      0   0   1   0        positions    0   1   2   3

Several labels, or numbers, are `labels` `[B, T * labels]`: those of a text stand where it has its weight. The losses are
transformers' (`ForSequenceClassificationLoss`), as sums over texts.

Without a head the words of the labels are trained, which is `ftjax.objectives.sft`.

Legend: B batch, C tokens of a chunk, L labels.
"""

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import EvaluateConfig
from ftjax.errors import UserError
from ftjax.models.classifier import MULTI, REGRESSION, SINGLE, classes_of, problem_of
from ftjax.models.context import Context
from ftjax.models.model import Model
from ftjax.objectives import sft
from ftjax.objectives.loss import Sums


def sums(
    model: Model,
    trainable: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    ctx: Context,
    loss_chunk: int,
    settings: EvaluateConfig,
) -> tuple[Sums, jax.Array]:
    """`(Sums, auxiliary loss)` of a batch `[B, T]`; `correct` counts texts whose class has the highest score, or of whose
    labels each is right (`settings.threshold`); of numbers it is 0."""
    kind = problem_of(model.config)
    if kind == SINGLE:
        # Targets without weight are tokens, of which there are more than classes.
        targets = jnp.where(batch["weights"] > 0, batch["targets"], 0)
        return sft.sums(model, trainable, frozen, {**batch, "targets": targets}, ctx, loss_chunk)
    if kind == REGRESSION:
        measure = squared_error
    else:
        measure = partial(binary_cross_entropy, tuple(thresholds(settings, classes_of(model.config)).tolist()))
    labels = batch["labels"].reshape(*batch["targets"].shape, -1)
    return sft.sums(model, trainable, frozen, {**batch, "targets": labels}, ctx, loss_chunk, measure)


def binary_cross_entropy(limits: tuple[float, ...], scores: jax.Array, labels: jax.Array, weights: jax.Array) -> Sums:
    """Of labels that are 0 or 1 `[B, C, L]`: the mean over them, as `BCEWithLogitsLoss` has it.

    Args:
        limits: the probability from which each label counts as said.
    """
    loss = jnp.mean(jax.nn.softplus(scores) - scores * labels, axis=-1)
    right = jnp.all((jax.nn.sigmoid(scores) >= jnp.array(limits, scores.dtype)) == (labels > 0.5), axis=-1)
    return Sums(jnp.sum(loss * weights), jnp.sum(weights), jnp.sum(right * weights))


def squared_error(scores: jax.Array, labels: jax.Array, weights: jax.Array) -> Sums:
    """Of numbers `[B, C, L]`: the mean over them, as `MSELoss` has it."""
    loss = jnp.mean(jnp.square(scores - labels), axis=-1)
    return Sums(jnp.sum(loss * weights), jnp.sum(weights), jnp.zeros((), jnp.float32))


def thresholds(settings: EvaluateConfig, labels: tuple[str, ...]) -> np.ndarray:
    """float64 `[L]`: `evaluate.threshold` of each label, 0.5 where it names only others.

    Raises UserError for a label that there is not.
    """
    given = settings.threshold
    if not isinstance(given, Mapping):
        return np.full(len(labels), given)
    if unknown := [name for name in given if name not in labels]:
        raise UserError(f"evaluate.threshold: {', '.join(unknown)}: no such label; there are {', '.join(labels)}")
    return np.array([given.get(name, 0.5) for name in labels])


def named(config: Mapping, loss: float, correct: float) -> dict[str, float]:
    """What an evaluation calls the mean loss and the share of what is right, by the model's config.json."""
    kind = problem_of(config)
    if kind == REGRESSION:
        return {"eval/loss": loss}
    if kind == MULTI:
        return {"eval/loss": loss, "eval/subset_accuracy": correct}
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/token_accuracy": correct}
