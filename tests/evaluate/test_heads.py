"""Tests metrics of several labels per row, and of numbers, against scikit-learn and SciPy."""

import json

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from ftjax.evaluate.statistic import compare
from ftjax.evaluate.tasks.heads import by_label, by_output, multi_label, regression

LABELS = ["a", "b", "c", "never"]


@pytest.fixture
def several():
    rng = np.random.default_rng(0)
    truth = rng.random((60, 4)) < [0.5, 0.2, 0.7, 0.0]
    return truth, np.clip(0.6 * truth + 0.6 * rng.random((60, 4)) - [0, 0, 0, 0.9], 0.01, 0.99)


def test_labels_are_scikit_learns(several):
    truth, likely = several
    limits = np.array([0.5, 0.3, 0.5, 0.5])
    said = likely >= limits
    chosen, found = multi_label(truth, likely, limits, LABELS)
    assert [json.loads(text) for text in chosen] == [[LABELS[i] for i in np.flatnonzero(row)] for row in said]
    rows = np.random.default_rng(1).integers(0, 60, 60)  # one resample, by hand
    again = {name: value[0] for name, value in found.combine(found.statistics[rows].sum(0, keepdims=True)).items()}
    for values, pick in ((found.values(), slice(None)), (again, rows)):
        pair = truth[pick], said[pick]
        assert values["micro_f1"] == pytest.approx(sklearn.metrics.f1_score(*pair, average="micro"))
        assert values["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(*pair, average="macro", zero_division=0))
        assert values["subset_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(*pair))
    table = by_label(truth, said, LABELS)
    each = sklearn.metrics.f1_score(truth, said, average=None, zero_division=0)
    assert [row[3] for row in table["rows"]] == pytest.approx(each.tolist())
    assert table["rows"][3] == ["never", 0.0, 0.0, 0.0, 0] and table["rows"][0][4] == truth[:, 0].sum()
    assert found.each[0]["probabilities"]["a"] == pytest.approx(likely[0, 0], abs=1e-6)


@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_are_scipys(outputs):
    rng = np.random.default_rng(0)
    truth = np.round(rng.normal(1000, 3, (50, outputs)))  # far from zero, and with ties
    said = truth + rng.normal(0.5, 2, truth.shape)
    chosen, found = regression(truth, said)
    values = found.values()
    assert json.loads(chosen[0]) == pytest.approx(said[0].tolist(), rel=1e-5)
    assert values["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(truth, said))
    assert values["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(truth, said))
    for name, of in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        each = [of(truth[:, i], said[:, i]).statistic for i in range(outputs)]
        assert values[name] == pytest.approx(np.mean(each))
        place = by_output(truth, said, ["x", "y"][:outputs])
        assert [row[place["head"].index(name)] for row in place["rows"]] == pytest.approx(each)
    rows = rng.integers(0, 50, 50)
    again = found.combine(found.statistics[rows].sum(0, keepdims=True))
    assert again["pearson"][0] == pytest.approx(
        np.mean([scipy.stats.pearsonr(truth[rows, i], said[rows, i]).statistic for i in range(outputs)])
    )


def test_what_never_changes_has_no_correlation():
    truth = np.arange(5.0)[:, None]
    for pair in ((truth, np.full((5, 1), 2.0)), (np.full((5, 1), 0.1), truth), (truth[:1], truth[:1])):
        values = regression(*pair)[1].values()
        assert np.isnan(values["pearson"]) and np.isnan(values["spearman"]) and np.isfinite(values["mse"])


def test_two_models_are_compared():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (40, 1))
    better, worse = (regression(truth, truth + rng.normal(0, noise, truth.shape))[1] for noise in (0.1, 2))
    found = compare(worse, better, confidence=0.95, resamples=500, seed=0)
    assert found["mse"].value < 0 and found["mse"].p_value < 0.01
    assert found["pearson"].value > 0 and found["pearson"].p_value < 0.01
