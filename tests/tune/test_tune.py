"""Tests of `ftjax tune`: what it reads, how it searches, resumes and repeats, and what it writes.

Most runs here are made without training: `write_run` writes the files of one whose loss follows from its settings.
"""

import json
import math
import os
from pathlib import Path

import pytest
from tiny_settings import ROWS, SETTINGS
from verbs import ftjax as command

import ftjax
from ftjax.config.load import load_config, save_config
from ftjax.page.coordinates import Axis, bar_chart, parallel_chart
from ftjax.tune import study as studies
from ftjax.tune import work as working
from ftjax.tune.shares import shares
from ftjax.tune.space import Dimension, parse
from ftjax.tune.study import Plan, ended, open_study, owner

CONFIG = {**SETTINGS, "data": {"train": "train.jsonl", "validation": "train.jsonl"}}
SPACE = "optimizer.learning_rate=log(1e-5,1e-1) method.r=[2,4]"


def loss(config) -> float:
    """The lowest at a learning rate of 1e-3 and rank 4."""
    return abs(math.log10(config.optimizer.learning_rate) + 3) + (config.method.r != 4) / 2


def write_run(config, *, on_log=None, bad=lambda config: False, **_):
    """Write the files of a run of four evaluations, which go on from those that it has."""
    folder = Path(config.output_dir)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    file = folder / "metrics.jsonl"
    begun = len(file.read_text().splitlines()) if file.exists() else 0
    for step in range(begun + 1, 5):
        row = {"step": step, "eval/loss": loss(config) + 1 / step}
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        on_log(row)
        if bad(config):
            raise ftjax.UserError("too large for this machine")
    for name in ("final", "best"):
        (folder / name).mkdir()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(working, "train_config", write_run)
    return tmp_path


def settings(found) -> list[dict]:
    return [one["settings"] for one in found.trials]


@pytest.mark.parametrize("text, wanted", [
    ("optimizer.learning_rate=log(1e-5, 1e-3)", [Dimension("optimizer.learning_rate", "log", 1e-5, 1e-3)]),
    ("method.r=[8,16] method.lora_dropout=uniform(0,0.1)", [
        Dimension("method.r", "choice", choices=(8, 16)), Dimension("method.lora_dropout", "uniform", 0, 0.1),
    ]),
    ("model.quantization=[null, nf4] method.use_dora=[true,false]", [
        Dimension("model.quantization", "choice", choices=(None, "nf4")),
        Dimension("method.use_dora", "choice", choices=(True, False)),
    ]),
    ("method.r=logint(8,64)", [Dimension("method.r", "logint", 8, 64)]),
])  # fmt: skip
def test_search_spaces(text, wanted):
    assert parse(text) == wanted
    assert parse(" ".join(f"{one.key}={one.text}" for one in wanted)) == wanted
    assert parse({one.key: list(one.choices) or one.text for one in wanted}) == wanted


@pytest.mark.parametrize("text, message", [
    ("", "names no key"),
    ("method.r", "cannot read 'method.r'"),
    ("method.r=8,16", "cannot read 'method.r=8,16'"),
    ("method.r=[8]", "at least two"),
    ("method.r=int(8,2)", "the smaller one first"),
    ("method.r=int(1.5,2)", "whole numbers"),
    ("optimizer.learning_rate=log(0,1)", "above 0"),
    ("optimizer.learning_rate=log(a,b)", "are numbers"),
    ("optimizer.learning_rate=lin(1,2)", "expected log"),
    ("method.r=[1,2] method.r=[3,4]", "method.r twice"),
])  # fmt: skip
def test_search_spaces_that_are_wrong(text, message):
    with pytest.raises(ftjax.UserError, match=message):
        parse(text)


def test_all_mistakes_are_found_before_a_trial(home):
    wrong = r"(?s)2 things.*method.r=0.*method.lora_drpout=[^ ]*: unknown key; did you mean lora_dropout"
    with pytest.raises(ftjax.UserError, match=wrong):
        ftjax.tune(CONFIG, "method.r=[0,4] method.lora_drpout=uniform(0,0.1)", trials=2)
    with pytest.raises(ftjax.UserError, match="each trial has a folder of its own"):
        ftjax.tune(CONFIG, "output_dir=[a,b]", trials=2)
    with pytest.raises(ftjax.UserError, match=r"nothing to evaluate; set data\.validation"):
        ftjax.tune(SETTINGS, SPACE, trials=2)
    assert not list(home.iterdir())


def test_a_search_finds_the_best_and_writes_it(home, capsys):
    found = ftjax.tune(CONFIG, SPACE, trials=12)
    values = [
        loss(load_config(Path(one["folder"]) / "config.yaml")) + 1 / 4 for one in found.trials if one["state"] == "complete"
    ]
    assert found.value == pytest.approx(min(values)) and found.settings["method.r"] == 4
    assert found.config.optimizer.learning_rate == found.settings["optimizer.learning_rate"]
    assert found.config.output_dir == "runs/default" and found.best.config.method.r == 4
    out = capsys.readouterr().out
    assert "best so far" in out and "ftjax train tune/best.yaml" in out
    page = Path("tune/tune.html").read_text()
    assert all(title in page for title in ("importance for the result", "settings and results", "best so far"))
    assert "<script" not in page and "http" not in page
    for one in found.trials:  # the weights of the best alone
        folder = Path(one["folder"])
        assert not (folder / "checkpoints").exists()
        assert (folder / "final").exists() == (folder == found.best.folder)


def test_the_same_seed_gives_the_same_search(home):
    one, two, other = (
        settings(ftjax.tune(CONFIG, SPACE, trials=6, out=out, seed=seed, quiet=True))
        for out, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == two != other


def test_a_search_that_is_interrupted_goes_on_as_if_it_had_not_been(home, monkeypatch):
    whole = ftjax.tune(CONFIG, SPACE, trials=12, out="whole", quiet=True)
    runs = 0

    def interrupted(config, *, on_log, **given):
        nonlocal runs
        runs += 1

        def log(row):
            on_log(row)
            if runs in (3, 5) and row["step"] == 2:
                raise ftjax.Interrupted("stopped")

        write_run(config, on_log=log, **given)

    monkeypatch.setattr(working, "train_config", interrupted)
    for _ in range(2):
        with pytest.raises(ftjax.Interrupted):
            ftjax.tune(CONFIG, SPACE, trials=12, out="parts", quiet=True)
    parts = ftjax.tune(CONFIG, SPACE, trials=12, out="parts", quiet=True)
    assert settings(parts) == settings(whole) and parts.value == whole.value
    assert [one["state"] for one in parts.trials] == [one["state"] for one in whole.trials]
    assert len(list(Path("parts/trials").iterdir())) == 12  # the interrupted ones went on in their folders


def test_a_trial_whose_process_has_died_is_taken_over(home):
    ftjax.tune(CONFIG, SPACE, trials=2, out="tune", quiet=True)
    plan = Plan(settings_of_search(), tuple(parse(SPACE)), Path("tune"), 3, 42, name="tune")
    opened = open_study(plan)
    trial, _ = studies.ask(plan, opened)
    trial.set_user_attr(studies.OWNER, owner().replace(str(os.getpid()), "999999999"))
    found = ftjax.tune(CONFIG, SPACE, trials=3, out="tune", quiet=True)
    assert (
        len(found.trials) == 3
        and found.trials[-1]["folder"] == str(home / "tune/trials/0002")
        and found.folder == home / "tune"
    )
    assert found.trials[-1]["settings"] == trial.params


def test_a_trial_of_a_process_that_runs_is_left_alone(home):
    ftjax.tune(CONFIG, SPACE, trials=1, out="tune", quiet=True)
    plan = Plan(settings_of_search(), tuple(parse(SPACE)), Path("tune"), 3, 42, name="tune")
    opened = open_study(plan)
    studies.ask(plan, opened)
    assert studies.take_over(plan, opened) == 0
    assert len(ftjax.tune(CONFIG, SPACE, trials=3, out="tune", quiet=True).trials) == 2


def test_more_trials_continue_a_search_and_another_one_is_refused(home):
    first = ftjax.tune(CONFIG, SPACE, trials=3, quiet=True)
    more = ftjax.tune(CONFIG, SPACE, trials=5, quiet=True)
    assert settings(more)[:3] == settings(first) and len(more.trials) == 5
    for changed in ({"search": "method.r=[2,8]"}, {"seed": 7}, {"sampler": "random"}):
        with pytest.raises(ftjax.UserError, match=f"this study is another search: {next(iter(changed))} is .*--out"):
            ftjax.tune(CONFIG, changed.pop("search", SPACE), trials=5, quiet=True, **changed)


def test_a_bad_trial_is_pruned(home):
    found = ftjax.tune(CONFIG, SPACE, trials=12, quiet=True)
    pruned = [one for one in found.trials if one["state"] == "pruned"]
    assert pruned and all(one["value"] is None or one["value"] > found.value for one in pruned)
    steps = [len((Path(one["folder"]) / "metrics.jsonl").read_text().splitlines()) for one in pruned]
    assert min(steps) < 4
    every = ftjax.tune(CONFIG, SPACE, trials=12, out="every", prune=False, quiet=True)
    assert {one["state"] for one in every.trials} == {"complete"}


def test_a_trial_may_fail_and_three_in_a_row_end_the_search(home, monkeypatch):
    def failing(bad):
        return lambda config, **given: write_run(config, bad=bad, **given)

    monkeypatch.setattr(working, "train_config", failing(lambda config: config.output_dir.endswith("1")))
    found = ftjax.tune(CONFIG, SPACE, trials=3, out="some", quiet=True)
    assert [one["state"] for one in found.trials] == ["complete", "fail", "complete"]
    assert "failed: too large for this machine" in Path("some/tune.html").read_text()
    monkeypatch.setattr(working, "train_config", failing(lambda config: True))
    with pytest.raises(ftjax.UserError, match=r"3 trials in a row failed, .* too large"):
        ftjax.tune(CONFIG, SPACE, trials=9, out="all", quiet=True)


def test_the_greatest_value_wins_where_more_is_better(home, monkeypatch):
    monkeypatch.setattr(working, "train_config", lambda config, *, on_log, **given: write_run(
        config, on_log=lambda row: on_log({**row, "eval/accuracy": row["eval/loss"]}), **given
    ))  # fmt: skip
    monkeypatch.setattr(working, "_value", lambda plan, run: loss(run.config))
    found = ftjax.tune(CONFIG, SPACE, trials=8, training__metric_for_best_model="accuracy", prune=False, quiet=True)
    assert found.value == max(one["value"] for one in found.trials)


def test_a_journal_in_place_of_sqlite(home):
    found = ftjax.tune(CONFIG, SPACE, trials=3, storage="journal:shared.log", study="mine", quiet=True)
    assert Path("shared.log").stat().st_size and not Path("tune/study.db").exists()
    again = ftjax.tune(CONFIG, SPACE, trials=3, storage="journal:shared.log", study="mine", out="elsewhere", quiet=True)
    assert settings(again) == settings(found)


def test_a_storage_that_is_not_one(home):
    with pytest.raises(ftjax.UserError, match="--storage nonsense: cannot be opened"):
        ftjax.tune(CONFIG, SPACE, trials=1, storage="nonsense", quiet=True)


def settings_of_search():
    from ftjax.api.settings import settings_of

    return settings_of(CONFIG)


def test_devices_are_divided(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert [one.cores for one in shares(2, {"JAX_PLATFORMS": "cpu"})] == [(0, 1), (2, 3)]
    with pytest.raises(ftjax.UserError, match="this host has 5 CPU cores"):
        shares(6, {"JAX_PLATFORMS": "cpu"})
    with pytest.raises(ftjax.UserError, match="several hosts instead"):
        shares(2, {"JAX_PLATFORMS": "tpu"})
    monkeypatch.setattr("ftjax.tune.shares.gpus_here", lambda: True)
    found = shares(2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    assert [one.environment for one in found] == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]


def test_rows_in_memory_stay_in_their_process(home):
    with pytest.raises(ftjax.UserError, match="write them to a file"):
        ftjax.tune(CONFIG, SPACE, trials=2, parallel=2, data__train=ROWS, quiet=True)


@pytest.mark.parametrize("values, logarithmic, places", [
    ((1.0, 2.0, 3.0), False, [0, 0.5, 1]),
    ((1e-4, 1e-3, 1e-2), True, [0, 0.5, 1]),
    (("null", "nf4", "null"), False, [1, 0, 1]),
    ((True, False), False, [1, 0]),
    ((2, 2), False, [0.5, 0.5]),
    ((1.0, None, 3.0), False, [0, None, 1]),
])  # fmt: skip
def test_places_on_an_axis(values, logarithmic, places):
    assert Axis("x", values, logarithmic).places() == pytest.approx(places)


def test_charts_say_what_they_show():
    drawn = parallel_chart("all", [Axis("r", (2, 4)), Axis("<loss>", (1.0, 0.5))], ["first", "second"], 1)
    assert drawn.count("<polyline") == 2 and "&lt;loss&gt;" in drawn and "the best: second" in drawn
    assert "r: 75%" in bar_chart("importance", {"r": 0.75}) and bar_chart("importance", {}) == ""


@pytest.mark.sweep
def test_real_trials_at_the_same_time(tmp_path, monkeypatch, untrained):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = {**CONFIG, "model": {**CONFIG["model"], "path": str(untrained)}}
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    found = ftjax.tune(given, SPACE, trials=4, parallel=2, quiet=True, prune=False)
    assert [one["state"] for one in found.trials] == ["complete"] * 4
    assert found.best.metrics["eval/loss"].min() == found.value


def test_the_command(home, capsys):
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    save_config(settings_of_search(), "run.yaml")
    assert command("tune", "run.yaml", "--search", SPACE, "--trials", "2", "training.seed=7") == 0
    assert "written: tune/tune.html, tune/best.yaml" in capsys.readouterr().out
    assert len(ended(open_study(Plan(settings_of_search(), tuple(parse(SPACE)), Path("tune"), 2, 7, name="tune")))) == 2
    assert command("tune", "run.yaml", "--search", "method.r=[1]") == 2
    assert "at least two" in capsys.readouterr().err


def test_without_optuna(home, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ftjax.UserError, match=r"pip install 'ftjax\[tune\]'"):
        ftjax.tune(CONFIG, SPACE, trials=1)
