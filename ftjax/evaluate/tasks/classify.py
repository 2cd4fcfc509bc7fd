"""The task `classification`: choose the class that is the most likely answer, and compute scikit-learn's metrics."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ftjax.config import EvaluateConfig
from ftjax.data.example import Example
from ftjax.errors import UserError
from ftjax.evaluate.extra import need
from ftjax.evaluate.fit import check_labels
from ftjax.evaluate.rows import Item
from ftjax.evaluate.statistic import Scores


def labels_of(items: Sequence[Item], config: EvaluateConfig) -> list[str]:
    """Return the classes in the configuration, or all that occur, in alphabetical order.

    Raises UserError for a row of another class, or if there is only one class.
    """
    found = sorted({item.label for item in items})
    if config.labels is None:
        if len(found) < 2:
            raise UserError(
                f"evaluate.task classification: all rows have the class {found[0]!r}; name the classes in evaluate.labels"
            )
        check_labels([item.label for item in items])
        if len(found) > 200:
            raise UserError(f"evaluate.task classification: {len(found)} different answers are no classes; choose another task")
        return found
    for item in items:
        if item.label not in config.labels:
            raise UserError(f"{item.where}: the class {item.label!r} is not in evaluate.labels: {', '.join(config.labels)}")
    return list(config.labels)


def with_label(item: Item, label: str) -> Example:
    """Return the row with `label` as its answer."""
    example = item.example
    changes = {}
    if example.completion is not None:
        space = example.completion[: len(example.completion) - len(example.completion.lstrip())]
        changes["completion"] = space + label
    if example.messages is not None:
        changes["messages"] = (*example.messages[:-1], {**example.messages[-1], "content": label})
    return replace(example, **changes)


def classification(items: Sequence[Item], likelihoods: np.ndarray, labels: Sequence[str]) -> tuple[list[str], Scores]:
    """Return `(the class of each row, scores)`.

    Args:
        likelihoods: [N, classes], log p of each class.
    """
    sklearn = need("sklearn.metrics", "evaluate.task classification")
    size = len(labels)
    truth = np.array([labels.index(item.label) for item in items])
    chosen = likelihoods.argmax(1)
    shares = np.exp(likelihoods - np.logaddexp.reduce(likelihoods, axis=1, keepdims=True))
    statistics = np.zeros((len(items), size * size))
    statistics[np.arange(len(items)), truth * size + chosen] = 1
    true_grid, said_grid = np.repeat(np.arange(size), size), np.tile(np.arange(size), size)

    def one(weights: np.ndarray) -> tuple[float, float, float]:
        cells = weights > 0
        true, said, weights = true_grid[cells], said_grid[cells], weights[cells]
        with warnings.catch_warnings():  # a resample may have only one class
            warnings.simplefilter("ignore")
            return (
                sklearn.accuracy_score(true, said, sample_weight=weights),
                sklearn.f1_score(true, said, sample_weight=weights, average="macro", zero_division=0),
                sklearn.matthews_corrcoef(true, said, sample_weight=weights),
            )

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        tables, which = np.unique(sums, axis=0, return_inverse=True)
        with need("sklearn", "evaluate.task classification").config_context(assume_finite=True, skip_parameter_validation=True):
            found = np.array([one(row) for row in tables])[which.ravel()]
        return {name: found[:, column] for column, name in enumerate(("accuracy", "macro_f1", "mcc"))}

    each = [
        {"accuracy": float(true == said), "probabilities": dict(zip(labels, np.round(share, 6).tolist(), strict=True))}
        for true, said, share in zip(truth, chosen, shares, strict=True)
    ]
    return [labels[i] for i in chosen], Scores(each, statistics, combine, yes={"accuracy": int((truth == chosen).sum())})


def confusion_matrix(items: Sequence[Item], chosen: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Return counts by true class (rows) and chosen class (columns)."""
    sklearn = need("sklearn.metrics", "evaluate.task classification")
    return sklearn.confusion_matrix([item.label for item in items], list(chosen), labels=list(labels)).tolist()
