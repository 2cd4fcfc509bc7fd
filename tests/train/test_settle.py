"""Tests that a run which is told to stop at any line of its loop loses no metrics, no evaluation and no count."""

import copy
import itertools
import math
import sys
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from oracle import ONE
from processes import ALL
from whole_runs import config

import ftjax.train.loop as loop
from ftjax.data.pipeline import load_splits
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.train.log import Log
from ftjax.train.loop import Run
from ftjax.train.setup import prepare
from ftjax.train.step import StepMetrics

TOTAL, BAD = 12, (5, 6)
CODES = [getattr(Run, name).__code__ for name in ("loop", "settle", "look", "read_next", "read", "evaluate", "save")]
CODES += [getattr(Log, name).__code__ for name in ("read", "row")]


class Batches:
    """A `BatchSource` that counts."""

    steps, steps_per_epoch = TOTAL, TOTAL
    layout = SimpleNamespace(arrays=lambda batch: batch)
    follows, metrics, texts, trouble = False, {}, (), None

    def __init__(self):
        self.at = 0

    def next(self, params):
        self.at += 1
        return {"tokens": jnp.int32(self.at)}

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


class Kept:
    """Checkpoints in memory."""

    folder = "memory"

    def __init__(self):
        self.saved = {}

    @property
    def latest(self):
        return max(self.saved, default=None)

    def save(self, step, state, meta, reference=None):
        assert step not in self.saved
        seen = meta["watch"]["seen"]
        assert not seen or seen[-1][0] == step, "what is saved has been read"
        self.saved[step] = (state, copy.deepcopy(meta))

    def wait(self):
        pass

    def restore(self, like, reference=None):
        return (*self.saved[self.latest], {})


class Rows:
    """Collects what is logged."""

    def __init__(self):
        self.rows = []

    def log(self, step, row):
        timeless = {name: value for name, value in row.items() if "second" not in name and "memory" not in name}
        self.rows.append({"step": step, **timeless})

    def log_texts(self, *_):
        pass

    def warn(self, step, text):
        self.rows.append({"step": step, "warning": text})


def step(bad, state, frozen, batch, key, limit):
    """An update by number: its state is a sum over what was applied, so that the order shows."""
    number = int(batch["tokens"])
    loss = math.nan if number in bad else 1.0 + number / 7
    good = loss <= limit
    values = (loss, 4.0 + number, 4.0 + number, 10.0, 100.0, 1.0, 0.1, good)
    state = SimpleNamespace(step=state.step + good, params={"sum": state.params["sum"] * 3 + number} if good else state.params)
    return state, StepMetrics(*map(jnp.asarray, values), {"token_accuracy": (jnp.float32(number), jnp.float32(2.0))})


@pytest.fixture(scope="module")
def make(model, data, tmp_path_factory):
    """`make(checkpoints, bad)`: a run whose updates are numbers, at its beginning or where the checkpoints say."""
    settings = config(model, data, tmp_path_factory.mktemp("run"), training__max_steps=TOTAL)
    setup, tokenizer = prepare(settings, ONE), load_tokenizer(settings.model)
    _, validation = load_splits(settings.data, tokenizer, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_steps", lambda *_: (None, None, None, lambda number: number))
        patch.setattr(loop, "abstract_state", lambda *_: None)
        patch.setattr(loop, "bring_best_back", lambda *_: None)
        patch.setattr(loop, "say", lambda *_: None)
        patch.setattr(Run, "losses", lambda self: {"eval/loss": 1 / (1 + self.state.params["sum"])})
        patch.setattr(Run, "write", lambda *_: None)
        patch.setattr(loop.Progress, "report", lambda *_: None)

        def make(checkpoints, bad=BAD):
            run = Run(setup, tokenizer, Batches(), validation, checkpoints, {}, "the same command")
            run.tracker, run.train_step, first = Rows(), partial(step, bad), 0
            if checkpoints.latest is None:
                run.state = SimpleNamespace(step=0, params={"sum": 0})
            else:
                setup.params, first = {}, run.restore()
            return run, first

        yield make


def stop_at(run, line: int):
    """Return a tracer that tells the run to stop after this many lines of the loop's functions, and a counter of the lines."""
    seen = itertools.count(1)
    lines = []

    def inside(frame, event, arg):
        if event == "line":
            lines.append(next(seen))
            if lines[-1] == line:
                run.interrupted = "SIGTERM"
        return inside

    return (lambda frame, event, arg: inside if frame.f_code in CODES else None), lines


def go(run, first, line=0):
    tracer, lines = stop_at(run, line)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        return run.loop(first), len(lines)
    finally:
        sys.settrace(before)


def test_stopped_at_every_line(make):
    whole, first = make(Kept())
    _, lines = go(whole, first)
    assert lines > 300 and whole.state.step == TOTAL - len(BAD) and whole.watch.skipped == len(BAD)
    assert [row["step"] for row in whole.tracker.rows if "eval/loss" in row] == [4, 8, 12]
    stops = set()
    for line in range(1, lines + 1, 1 if ALL else 9):
        kept = Kept()
        run, first = make(kept)
        done, _ = go(run, first, line)
        stops.add(done)
        assert run.interrupted and kept.latest == done and not run.pending
        state, meta = kept.saved[done]
        assert state.step + meta["watch"]["skipped"] == done == meta["data"] == meta["step"]
        logged = run.tracker.rows
        assert all(row["step"] <= done for row in logged)
        again, first = make(kept)
        go(again, first)
        assert again.state == whole.state and again.watch.state() == whole.watch.state()
        assert logged + again.tracker.rows == whole.tracker.rows, line
    assert stops == set(range(1, TOTAL + 1))


def test_giving_up_loses_nothing(make):
    """The checkpoint has every update in it, read and counted; the next start goes on behind the bad ones."""
    kept, bad = Kept(), tuple(range(4, 10))
    run, first = make(kept, bad)
    with pytest.raises(loop.Diverged, match=r"step 9: 6 updates in a row"):
        run.loop(first)
    state, meta = kept.saved[9]
    assert not run.pending and state.step == 3 and meta["data"] == 9
    again, first = make(kept)
    assert first == 9 and again.watch.in_a_row == 0 and again.watch.skipped == 6
    assert again.loop(first) == TOTAL and again.state.step == 6
    logged = [row["step"] for row in run.tracker.rows + again.tracker.rows if "train/skipped_updates" in row]
    assert logged == list(range(2, TOTAL + 1, 2))
