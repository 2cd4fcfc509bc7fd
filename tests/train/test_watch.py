"""Tests the watchdog's limits, by numbers."""

import math

import pytest

from ftjax.train.watch import FLOOR, WARMUP, WINDOW, LossWatch


def fed(losses, watch=None, first=1):
    """Return a watch that has seen these losses, each applied if the limit allows it, and which of them were skipped."""
    watch, skipped = watch or LossWatch(10.0, 5), []
    for step, loss in enumerate(losses, first):
        good = loss <= watch.limit(step)
        watch.see(step, loss, good)
        if not good:
            skipped.append(step)
    return watch, skipped


def test_losses_below_zero():
    """A negative loss, such as a negated reward, is judged by its distance above the usual."""
    watch = LossWatch(10.0, 3)
    for step in range(1, 20):
        watch.see(step, -5.0 - 0.1 * (step % 3), True)
    assert -5.3 + 3 < watch.limit(22) < 0
    for step in range(20, 40):
        watch.see(step, 1e-6 * (-1) ** step, True)
    assert 2.9 < watch.limit(42) < 3.1


def test_odd_rows_among_easy_ones_are_no_divergence():
    """The median is near zero, and a few batches have a hard row."""
    losses = [0.06, 0.05, 0.07, 0.06] * 25
    losses[50], losses[80] = 1.54, 2.9
    assert fed(losses)[1] == []


def test_hard_rows_that_keep_coming_are_trained():
    """One of six rows is ten nats: the first few are spikes, then they are usual; the run never gives up."""
    losses = [0.01] * 20 + [10.0 if n % 6 == 0 else 0.01 for n in range(200)]
    watch, skipped = fed(losses)
    assert 0 < len(skipped) < 6 and not watch.gives_up


def test_spikes_are_skipped_and_then_it_gives_up():
    losses = [2.0, 2.2, 1.9, 2.1] * 10
    watch, skipped = fed([*losses, 30.0, 2.0])
    assert skipped == [41] and watch.skipped == 1 and watch.in_a_row == 0
    watch, skipped = fed([*losses, *[30.0] * 5])
    assert watch.in_a_row == 5 and not watch.gives_up
    watch, skipped = fed([30.0], watch, 46)
    assert watch.gives_up and watch.skipped == 6
    watch.forget()
    assert not watch.gives_up and watch.skipped == 6 and watch.limit(48) == math.inf


def test_a_wide_spread_is_usual():
    """Batches have one row, and one in four is much harder."""
    assert fed([1.0, 1.5, 2.0, 9.0] * 30)[1] == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number(bad):
    watch = LossWatch(10.0, 2)
    for step in range(1, 10):
        watch.see(step, 1.0, True)
    watch.see(10, bad, False)
    watch.see(11, 1.0, True)
    assert watch.limit(13) == 1.0 + FLOOR and watch.skipped == 1


def test_warm_up_and_off():
    watch, _ = fed([1.0] * WARMUP)
    assert watch.limit(WARMUP + 1) == math.inf and watch.limit(WARMUP + 2) == 1.0 + FLOOR
    assert fed([1.0] * 20 + [1e9], LossWatch(None, 5))[1] == []


def test_limits_do_not_depend_on_when_metrics_are_read():
    """An update's limit is the same whether or not earlier metrics were read, and after saving the state as JSON."""
    import json
    import random

    rng = random.Random(0)
    early, late = LossWatch(2.0, 5), LossWatch(2.0, 5)
    waiting = None
    for step in range(1, 5 * WINDOW):
        limit = early.limit(step)
        assert limit == late.limit(step)
        loss = rng.choice([1.0, 1.2, 1.4, 9.0, math.nan]) if step % 3 == 0 else 1.0
        row = (step, loss, loss <= limit)
        early.see(*row)
        if waiting:
            late.see(*waiting)
        waiting = row
        if step % 7 == 0:
            again = LossWatch(2.0, 5)
            again.load(json.loads(json.dumps(early.state())))
            early = again
    assert early.skipped > 5
