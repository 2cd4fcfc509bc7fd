"""The task `preference`: whether a model prefers the chosen answer of each pair to the rejected one."""

from collections.abc import Sequence

import numpy as np

from ftjax.data.encoder import Unit
from ftjax.evaluate.likelihood import Likelihood
from ftjax.evaluate.statistic import Scores, means


def by_likelihood(found: Sequence[tuple[Likelihood, Likelihood] | None]) -> Scores:
    """Score pairs by the log-probabilities of their answers, in nats: of the whole answer, and per token.

    Args:
        found: of the chosen and the rejected answer; None for a row that was left out.
    """
    rows = []
    for pair in found:
        if pair is None:
            rows.append({})
            continue
        logps = [-one.loss for one in pair]
        each = [logp / max(one.weight, 1e-9) for logp, one in zip(logps, pair, strict=True)]
        rows.append({
            "pair_accuracy": float(logps[0] > logps[1]), "pair_accuracy_per_token": float(each[0] > each[1]),
            "margin": logps[0] - logps[1],
        })  # fmt: skip
    return means(rows)


def by_score(found: Sequence[tuple[float, float] | None]) -> Scores:
    """Score pairs by a reward model's scores; None for a row that was left out."""
    return means([
        {} if pair is None
        else {"pair_accuracy": float(pair[0] > pair[1]), "margin": pair[0] - pair[1], "mean_reward": sum(pair) / 2}
        for pair in found
    ])  # fmt: skip


def implicit_rewards(tuned: np.ndarray, base: np.ndarray) -> Scores:
    """Score pairs by how much likelier the tuned model makes each answer than its base does, as preference training does.

    Args:
        tuned, base: [N, 2], log-probabilities of the chosen and the rejected answer; NaN for a row that was left out.
    """
    ratios = tuned - base
    return means([
        {} if np.isnan(row).any() else {"reward_accuracy": float(row[0] > row[1]), "reward_margin": float(row[0] - row[1])}
        for row in ratios
    ])  # fmt: skip


def fits(unit: Unit, context: int) -> bool:
    """Return whether both documents of a pair are no longer than the context, in tokens."""
    return max(len(document.tokens) for document in unit) <= context
