"""Uncertainty of metrics: bootstrap intervals, and tests of whether two models differ on the same rows.

A metric is a function of sums over rows: a mean of the sum of scores and their number, BLEU of n-gram counts, macro F1 of the
confusion matrix. So a resample is a matrix product, and a corpus metric is resampled as exactly as a mean.

Legend: N rows, R resamples, K statistics.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLOCK = 1 << 24  # most numbers of the resampling matrix in memory at a time

# sums [R, K] -> metrics by name, [R] each
Combine = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Scores:
    """Scores of a task on its rows.

    Attributes:
        each: by row, what is written beside its prediction.
        statistics: float64 [N, K], summed over rows.
        combine: turns sums of `statistics` into metrics.
        rows: number of rows that have a metric, for metrics that not all rows have.
        yes: number of rows with value 1, for metrics that are shares of rows.
    """

    each: Sequence[Mapping[str, Any]]
    statistics: np.ndarray
    combine: Combine
    rows: Mapping[str, int] = field(default_factory=dict)
    yes: Mapping[str, int] = field(default_factory=dict)
    _drawn: dict[tuple[int, int], dict[str, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def values(self) -> dict[str, float]:
        """Return the metrics over all rows."""
        return {name: float(value[0]) for name, value in self.combine(self.statistics.sum(0, keepdims=True)).items()}

    def drawn(self, resamples: int, seed: int) -> dict[str, np.ndarray]:
        """Return the metrics `[R]` of rows drawn with replacement; cached, as intervals and differences both need them."""
        if (resamples, seed) not in self._drawn:
            self._drawn[resamples, seed] = self.combine(_resampled(self.statistics, resamples, seed))
        return self._drawn[resamples, seed]


def means(
    each: Sequence[Mapping[str, float]], shown: Sequence[Mapping[str, Any]] | None = None, *, shares: bool = True
) -> Scores:
    """Return metrics that are means over the rows which have them.

    Args:
        shown: written to the predictions in place of `each`.
        shares: metrics that are 0 or 1 in all rows are shares, not other numbers that happen to be 0 or 1.
    """
    names = list(dict.fromkeys(name for row in each for name in row))
    values = np.array([[float(row.get(name, 0)) for name in names] for row in each]).reshape(len(each), -1)
    there = np.array([[name in row for name in names] for row in each], np.float64).reshape(len(each), -1)
    width = len(names)

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):  # a resample may have no row with the metric
            found = sums[:, :width] / sums[:, width:]
        return {name: found[:, column] for column, name in enumerate(names)}

    rows = dict(zip(names, there.sum(0).astype(int).tolist(), strict=True))
    yes = {name: int(column.sum()) for name, column in zip(names, values.T, strict=True) if np.isin(column, (0, 1)).all()}
    statistics = np.concatenate([values, there], axis=1)
    return Scores(shown if shown is not None else each, statistics, combine, rows, yes if shares else {})


@dataclass(frozen=True)
class Interval:
    """A metric with the bounds of its confidence interval, and its number of rows."""

    value: float
    low: float
    high: float
    rows: int | None = None


@dataclass(frozen=True)
class Difference:
    """Tuned minus base, with the interval of the paired bootstrap and the `p_value` of the two-sided permutation test."""

    value: float
    low: float
    high: float
    p_value: float


def format_interval(found: Interval | Difference | Mapping[str, Any] | None, sign: str = "", share: bool = False) -> str:
    """Format as `0.42 (0.38 to 0.46)`, or a share as `42.0 % (38.0 to 46.0)`; without bounds that say nothing.

    Args:
        found: also as in a results.json. A dash stands for no value.
        sign: "+" for differences.
    """
    values = found if isinstance(found, Mapping) else {} if found is None else vars(found)
    numbers = [math.nan if values.get(key) is None else float(values[key]) for key in ("value", "low", "high")]
    if math.isnan(numbers[0]):
        return "-"
    shown = [format(100 * x, f"{sign}.1f") if share else format(x, f"{sign}.4g") for x in numbers]
    around = "" if any(map(math.isnan, numbers)) or len(set(shown)) == 1 else f" ({shown[1]} to {shown[2]})"
    return f"{shown[0]}{' %' if share else ''}{around}"


def interval_name(confidence: float) -> str:
    """Return `95 % interval`."""
    return f"{100 * confidence:g} % interval"


FEW = 30  # rows


def on_few(verdict: str, rows: int | None) -> str:
    """Add to a verdict the number of rows if they are few."""
    return f"{verdict} on {rows} only" if verdict in ("passed", "failed") and rows is not None and rows < FEW else verdict


def intervals(scores: Scores, *, confidence: float, resamples: int, seed: int) -> dict[str, Interval]:
    """Return percentile bootstrap intervals over rows (Efron 1979), deterministic for a seed.

    If a share is 0 or 1 in all rows, every resample is the same; its bounds are the exact ones (Clopper and Pearson 1934).
    """
    drawn, found = scores.drawn(resamples, seed), {}
    for name, value in scores.values().items():
        rows, yes = scores.rows.get(name, len(scores.each)), scores.yes.get(name)
        low, high = _bounds(drawn[name], confidence)
        if yes is not None and yes in (0, rows):
            reach = ((1 - confidence) / 2) ** (1 / rows)
            low, high = (reach, 1.0) if yes else (0.0, 1 - reach)
        found[name] = Interval(value, low, high, rows)
    return found


def compare(base: Scores, tuned: Scores, *, confidence: float, resamples: int, seed: int) -> dict[str, Difference]:
    """Compare two models on the same rows, in the same order.

    The interval is that of the differences in resamples of whole rows; the test exchanges the results of the two models row by
    row at random (Noreen 1989, approximate randomisation) and counts how often the difference is as large.
    """
    assert base.statistics.shape == tuned.statistics.shape, "the rows of the two models differ"
    draws = [one.drawn(resamples, seed) for one in (base, tuned)]
    before, after = base.values(), tuned.values()
    step = tuned.statistics - base.statistics
    exchanged = _product(lambda rng, size: rng.integers(0, 2, (size, len(step))), step, resamples, seed + 1)
    swapped = [one.combine(total) for one, total in (
        (base, base.statistics.sum(0) + exchanged), (tuned, tuned.statistics.sum(0) - exchanged)
    )]  # fmt: skip
    found = {}
    for name in before:
        value = after[name] - before[name]
        low, high = _bounds(draws[1][name] - draws[0][name], confidence)
        chance = np.abs(swapped[1][name] - swapped[0][name])
        as_large = np.count_nonzero(chance >= abs(value) - 1e-12)
        found[name] = Difference(value, low, high, (as_large + 1) / (resamples + 1))
    return found


def _resampled(statistics: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return sums `[R, K]` over N rows drawn with replacement."""
    rows = len(statistics)
    return _product(lambda rng, size: rng.multinomial(rows, np.full(rows, 1 / rows), size), statistics, resamples, seed)


def _product(draw: Callable, statistics: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng, step = np.random.default_rng(seed), max(1, BLOCK // max(1, len(statistics)))
    parts = [draw(rng, min(step, resamples - start)) @ statistics for start in range(0, resamples, step)]
    return np.concatenate(parts)


def _bounds(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
