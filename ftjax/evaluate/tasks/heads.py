"""Metrics of heads with several labels per row, or with numbers: F1 over labels, errors and correlations.

Legend: N rows, L labels or outputs.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftjax.evaluate.extra import need
from ftjax.evaluate.statistic import Scores

FLAT = 1e-9  # a variance below this share of the references' counts as zero


def multi_label(truth: np.ndarray, probabilities: np.ndarray, limits: np.ndarray, labels: Sequence[str]) -> tuple[list, Scores]:
    """Return `(the labels of each row as a JSON list, scores)`: F1 over all labels (micro), the mean F1 of the labels (macro),
    and the share of rows with every label right. F1 of a label that is neither true nor predicted is 0, as in scikit-learn.

    Args:
        truth: bool [N, L].
        limits: [L], the lowest probability at which a label counts.
    """
    said = probabilities >= limits
    size, right = len(labels), (said == truth).all(1)
    counts = [said & truth, said & ~truth, ~said & truth, right[:, None], np.ones((len(truth), 1), bool)]

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        hits, wrong, missed = (sums[:, size * i : size * (i + 1)] for i in range(3))
        return {
            "micro_f1": _f1(hits.sum(1), wrong.sum(1), missed.sum(1)),
            "macro_f1": _f1(hits, wrong, missed).mean(1),
            "subset_accuracy": sums[:, -2] / sums[:, -1],
        }

    each = [
        {"subset_accuracy": float(whole), "probabilities": dict(zip(labels, np.round(row, 6).tolist(), strict=True))}
        for whole, row in zip(right, probabilities, strict=True)
    ]
    chosen = [json.dumps([labels[i] for i in np.flatnonzero(row)], ensure_ascii=False) for row in said]
    return chosen, Scores(each, np.concatenate(counts, axis=1).astype(np.float64), combine)


def by_label(truth: np.ndarray, said: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Return a table of precision, recall, F1 and number of rows by label."""
    sklearn = need("sklearn.metrics", "evaluate.task classification")
    found = sklearn.precision_recall_fscore_support(truth, said, average=None, zero_division=0)
    rows = [[name, *map(float, row[:3]), int(row[3])] for name, row in zip(labels, zip(*found, strict=True), strict=True)]
    return {"head": ["label", "precision", "recall", "f1", "rows"], "rows": rows}


def _f1(hits: np.ndarray, wrong: np.ndarray, missed: np.ndarray) -> np.ndarray:
    return 2 * hits / np.maximum(2 * hits + wrong + missed, 1e-9)


def regression(truth: np.ndarray, said: np.ndarray) -> tuple[list[str], Scores]:
    """Return `(the numbers of each row as a JSON list, scores)`: squared and absolute error and both correlations, as means
    over outputs. The correlation with a constant is NaN.

    Resamples of Spearman's correlation keep the ranks among all rows.

    Args:
        truth, said: float64 [N, L].
    """
    from scipy.stats import rankdata

    middle, scale = truth.mean(0), np.where(truth.std(0) > 0, truth.std(0), 1)  # the same for both models
    pairs = [((truth - middle) / scale, (said - middle) / scale)]
    pairs += [tuple((rankdata(values, axis=0) - (len(truth) + 1) / 2) / max(1, len(truth)) for values in (truth, said))]
    moments = [part for x, y in pairs for part in (x, y, x * x, y * y, x * y)]
    errors = np.stack([np.ones(len(truth)), ((said - truth) ** 2).mean(1), np.abs(said - truth).mean(1)], 1)

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        means = sums / sums[:, :1]
        parts = np.split(means[:, 3:], 10, axis=1)
        found = {"mse": means[:, 1], "mae": means[:, 2]}
        return found | {"pearson": _correlation(*parts[:5]), "spearman": _correlation(*parts[5:])}

    each = [{"mse": float(row[1]), "mae": float(row[2])} for row in errors]
    chosen = [json.dumps([float(f"{value:.6g}") for value in row]) for row in said]
    return chosen, Scores(each, np.concatenate([errors, *moments], axis=1), combine)


def by_output(truth: np.ndarray, said: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return a table of the metrics by output."""
    found = [regression(truth[:, [i]], said[:, [i]])[1].values() for i in range(len(names))]
    return {"head": ["output", *found[0]], "rows": [[name, *row.values()] for name, row in zip(names, found, strict=True)]}


def _correlation(x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Return the mean over outputs, from means over rows `[R, L]`."""
    a, b = xx - x * x, yy - y * y
    flat = (a < FLAT) | (b < FLAT * np.maximum(yy, 1e-30))
    return (np.where(flat, np.nan, xy - x * y) / np.sqrt(np.where(flat, 1, a * b))).mean(1)
