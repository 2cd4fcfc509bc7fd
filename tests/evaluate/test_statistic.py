"""Tests intervals and paired tests against scipy and sacrebleu."""

import math

import numpy as np
import pytest
import scipy.stats

from ftjax.evaluate.statistic import Difference, Interval, compare, format_interval, intervals, means

OPTIONS = {"confidence": 0.95, "resamples": 4000, "seed": 1}


def scores(values):
    return means([{"x": float(value)} for value in values])


@pytest.fixture(scope="module")
def two():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 80)
    return base, base + rng.normal(0.12, 0.5, 80)


def test_interval_is_scipys(two):
    found = intervals(scores(two[0]), **OPTIONS)["x"]
    want = scipy.stats.bootstrap((two[0],), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert found.value == pytest.approx(two[0].mean())
    np.testing.assert_allclose([found.low, found.high], want, atol=0.015)
    narrow = intervals(scores(two[0]), **{**OPTIONS, "confidence": 0.5})["x"]
    assert found.low < narrow.low < narrow.high < found.high


def test_the_seed_decides(two):
    one, same, other = (intervals(scores(two[0]), **{**OPTIONS, "seed": seed})["x"] for seed in (1, 1, 2))
    assert one == same != other


def test_paired_test_is_scipys(two):
    found = compare(scores(two[0]), scores(two[1]), **OPTIONS)["x"]
    want = scipy.stats.permutation_test(
        two, lambda a, b: np.mean(b) - np.mean(a), permutation_type="samples", n_resamples=4000, rng=3
    )
    assert found.value == pytest.approx(want.statistic) and 0.005 < want.pvalue < 0.2
    assert found.p_value == pytest.approx(want.pvalue, abs=0.012)
    low, high = scipy.stats.bootstrap(
        (two[1] - two[0],), np.mean, n_resamples=4000, method="percentile", rng=1
    ).confidence_interval
    np.testing.assert_allclose([found.low, found.high], [low, high], atol=0.01)


def test_no_difference_has_no_evidence(two):
    found = compare(scores(two[0]), scores(two[0]), **OPTIONS)["x"]
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_rows_that_lack_a_metric_do_not_count():
    found = means([{"a": 1.0, "b": 1.0}, {"a": 0.0}, {"a": 0.5}])
    assert found.values() == {"a": 0.5, "b": 1.0}
    both = intervals(found, **OPTIONS)
    assert both["b"].rows == 1 and both["b"].low == pytest.approx(0.025) and both["a"].rows == 3


@pytest.mark.parametrize(("yes", "rows"), [(0, 2), (2, 2), (0, 40), (1, 1), (40, 40)])
def test_a_share_of_none_or_all_is_not_certain(yes, rows):
    found = intervals(scores([1] * yes + [0] * (rows - yes)), **OPTIONS)["x"]
    want = scipy.stats.binomtest(yes, rows).proportion_ci(0.95, method="exact")
    assert (found.value, found.rows) == (yes / rows, rows)
    np.testing.assert_allclose([found.low, found.high], [want.low, want.high], atol=1e-9)


def test_what_is_no_share_keeps_its_interval():
    """Values in nats or of a custom metric may all be 0 or 1 without being shares."""
    found = intervals(means([{"x": 0.0}] * 4, shares=False), **OPTIONS)["x"]
    assert (found.low, found.high) == (0, 0)


@pytest.mark.parametrize(
    ("found", "options", "text"),
    [
        (Interval(0.421, 0.38, 0.46001, 9), {}, "0.421 (0.38 to 0.46)"),
        ({"value": 0.421, "low": 0.38, "high": 0.46}, {"share": True}, "42.1 % (38.0 to 46.0)"),
        (Difference(0.02, -0.01, 0.05, 0.3), {"sign": "+"}, "+0.02 (-0.01 to +0.05)"),
        (Interval(3.0, math.nan, math.nan), {}, "3"),
        ({"value": 3, "low": None, "high": None}, {}, "3"),
        ({"value": 3}, {}, "3"),
        (Interval(0.0, 0.0, 0.0), {"share": True}, "0.0 %"),
        (Interval(0.0, 0.0, 0.84), {"share": True}, "0.0 % (0.0 to 84.0)"),
        (Interval(math.inf, 1.0, math.inf), {}, "inf (1 to inf)"),
        *[(nothing, {}, "-") for nothing in (None, {}, {"value": None}, Interval(math.nan, 0.0, 1.0))],
    ],
)
def test_intervals_are_written_alike(found, options, text):
    """Terminal, report and model card use this function; a results.json gives mappings with null for NaN."""
    assert format_interval(found, **options) == text
