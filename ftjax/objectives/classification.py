"""Sequence classification with a head, read at the last token of each text: one class, several labels, or numbers.

One row of a batch, for the text "Hi there" (ids 12, 57) of class 2, after BOS (1); the class follows the text as one more
token, which a causal model cannot see at the last token of the text (`ftjax.data.classes`):

    tokens       1  12  57   2        targets     12  57   2   0
    weights      0   0   1   0        positions    0   1   2   3

Several labels, or numbers, are `labels` `[B, T * labels]`: those of a text are at the token with its weight. The losses are
transformers' (`ForSequenceClassificationLoss`), as sums over texts.

Without a head, the words of the labels are trained, as in `ftjax.objectives.sft`.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from ftjax.config import ClassificationConfig, EvaluateConfig
from ftjax.data.classes import TextLabels, with_labels
from ftjax.data.encoding import Answers, RowEncoding
from ftjax.data.labels import Labels
from ftjax.errors import UserError
from ftjax.models.classifier import MULTI, classes_of
from ftjax.objectives import sft
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import Head, LossInputs, Objective


def loss(inputs: LossInputs) -> tuple[LossTotals, Float[Array, ""]]:
    """Compute the loss of a batch of texts.

    `token_accuracy` is the share of texts whose class has the highest score, `subset_accuracy` the share of those with every
    label right (`evaluate.threshold`); for numbers there is neither.
    """
    objective = inputs.config.objective
    if not objective.head:
        return sft.loss(inputs)
    targets, weights = inputs.batch["targets"], inputs.batch["weights"]
    if objective.single:
        # Targets without weight are tokens, whose ids may exceed the number of classes.
        return inputs.token_totals(jnp.where(weights > 0, targets, 0)), inputs.auxiliary
    labels = inputs.batch["labels"].reshape(*targets.shape, -1)
    measure = squared_error
    if objective.problem_type == MULTI:
        limits = thresholds(inputs.config.evaluate, classes_of(inputs.model.config))
        measure = partial(binary_cross_entropy, tuple(limits.tolist()))
    return inputs.token_totals(labels, measure), inputs.auxiliary


def binary_cross_entropy(
    limits: tuple[float, ...],
    scores: Float[Array, "B C labels"],
    labels: Float[Array, "B C labels"],
    weights: Float[Array, "B C"],
) -> LossTotals:
    """Average the binary cross-entropy over labels that are 0 or 1, as `BCEWithLogitsLoss` does.

    Args:
        limits: the lowest probability at which each label counts as predicted.
    """
    loss = jnp.mean(jax.nn.softplus(scores) - scores * labels, axis=-1)
    right = jnp.all((jax.nn.sigmoid(scores) >= jnp.array(limits, scores.dtype)) == (labels > 0.5), axis=-1)
    weight = jnp.sum(weights)
    return LossTotals(jnp.sum(loss * weights), weight, {"subset_accuracy": (jnp.sum(jnp.where(right, weights, 0)), weight)})


def squared_error(
    scores: Float[Array, "B C labels"], labels: Float[Array, "B C labels"], weights: Float[Array, "B C"]
) -> LossTotals:
    """Average the squared error over numbers, as `MSELoss` does."""
    loss = jnp.mean(jnp.square(scores - labels), axis=-1)
    return LossTotals(jnp.sum(loss * weights), jnp.sum(weights), {})


def thresholds(settings: EvaluateConfig, labels: tuple[str, ...]) -> Float64[np.ndarray, " labels"]:
    """Return `evaluate.threshold` of each label, 0.5 for labels that it does not name.

    Raises UserError for a label that does not exist.
    """
    given = settings.threshold
    if not isinstance(given, Mapping):
        return np.full(len(labels), given)
    if unknown := [name for name in given if name not in labels]:
        raise UserError(f"evaluate.threshold: {', '.join(unknown)}: no such label; there are {', '.join(labels)}")
    return np.array([given.get(name, 0.5) for name in labels])


def _head(section: ClassificationConfig) -> Head | None:
    if not section.head:
        return None
    return Head(None if section.labels is None else tuple(section.labels), section.problem_type)


def _encoding(section: ClassificationConfig) -> RowEncoding:
    labels = Labels.of(section)
    return TextLabels(labels) if section.head else Answers(labels)


def _derived(section: ClassificationConfig, means: Mapping[str, float]) -> dict[str, float]:
    """Perplexity is that of one class, or of its words; several labels and numbers have none."""
    return sft.perplexity(means["loss"]) if section.single else {}


OBJECTIVE = Objective(ClassificationConfig, _encoding, loss, _derived, _head, complete=with_labels, train_metrics=False)
