"""The task `loss`: the training loss, on other rows."""

from collections.abc import Sequence

import numpy as np

from ftjax.evaluate.likelihood import Likelihood
from ftjax.evaluate.statistic import Scores


def loss(found: Sequence[Sequence[Likelihood]]) -> Scores:
    """Return the loss per trained token, perplexity, and token accuracy, from the sums of each row.

    These are the same metrics as `eval/loss`, `eval/perplexity` and `eval/token_accuracy` of training.
    """
    statistics = np.array([
        [sum(one.loss for one in row), sum(one.weight for one in row), sum(one.correct for one in row)] for row in found
    ])  # fmt: skip

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        weight = np.maximum(sums[:, 1], 1e-9)
        mean = sums[:, 0] / weight
        return {"loss": mean, "perplexity": np.exp(np.minimum(mean, 700)), "token_accuracy": sums[:, 2] / weight}

    each = [
        {"loss": total / weight if weight else None, "tokens": weight, "token_accuracy": correct / weight if weight else None}
        for total, weight, correct in statistics.tolist()
    ]
    return Scores(each, statistics, combine)
