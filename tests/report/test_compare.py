"""Tests `ftjax report` of several runs, and `ftjax runs`: every number of every run is there, under its name."""

import fcntl
import json
import re
from datetime import datetime
from functools import partial
from types import SimpleNamespace

import pytest
import yaml
from pages import HOSTILE, Page
from verbs import ftjax

from ftjax.errors import UserError
from ftjax.report.command import compare
from ftjax.report.read import Run
from ftjax.report.runs import best_of, duration, find_runs, runs


def write_run(run, *, rows=20, rate=1e-4, method=None, final=True, evaluation=None, digest="aa", check=None, **more):
    run.mkdir(parents=True)
    config = {
        "model": {"path": "gpt2"}, "method": method or {"name": "lora", "r": 8}, "data": {"train": "a.jsonl"},
        "optimizer": {"learning_rate": rate}, "training": {"max_steps": 20}, "output_dir": str(run), **more,
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": n, "train/loss": 3 / n + rate * 1000, "train/tokens_per_second": 100.0} for n in range(1, rows + 1)]
    lines += [{"step": n, "eval/loss": abs(n - 10) + 1 + rate} for n in range(5, rows + 1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "starts": [{"time": "2026-01-01T00:00:00+00:00", "step": 0}], "steps": 20, "data": {},
        "devices": {"count": 1, "platform": "cpu", "kind": "cpu"}, "versions": {"jax": "0.10.2"},
        "documents": {"data.train": {"documents": 5, "tokens": 50, "digest": digest * 8}},
    }  # fmt: skip
    if final:
        (run / "final").mkdir()
        record |= {"finished": rows, "ended": "2026-01-01T02:00:00+00:00"}
    (run / "run.json").write_text(json.dumps(record))
    for number, values in enumerate(evaluation or ()):
        place = run / "evaluation" / str(number)
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(values))
    if check:
        (run / "check").mkdir()
        (run / "check" / "results.json").write_text(json.dumps(check))
    return run


def measured(value, rows=9, data="v.jsonl"):
    metric = {"value": value, "low": value - 0.125, "high": value + 0.125}
    return {"task": "f1", "data": data, "rows": rows, "confidence": 0.9, "model": "m", "metrics": {"f1": metric}}


@pytest.fixture
def three(tmp_path):
    harness = {"results": {"arc": {"acc,none": 0.4321, "acc_stderr,none": 0.1}}, "higher_is_better": {}, "model_name": "m"}
    finding = {"name": "empty", "title": HOSTILE, "share": True, "verdict": "failed", "rule": "at most 5 %", "rows": 4,
               "value": {"value": 0.5, "low": 0.25, "high": 0.75}}  # fmt: skip
    return [
        write_run(tmp_path / "a" / "one", evaluation=[measured(0.5), harness]),
        write_run(tmp_path / "b" / "one", rate=2e-4, evaluation=[measured(0.75, rows=12)], digest="bb"),
        write_run(
            tmp_path / "b" / "two <b>", method={"name": "full", "train": ["lm_head"]}, rows=12, final=False,
            evaluation=[measured(0.25, data="other.jsonl")], check={"failed": ["empty"], "findings": [finding]},
        ),
    ]  # fmt: skip


def test_the_page_has_every_run(three, tmp_path):
    out = compare(three, out=tmp_path / "page.html")
    text = out.read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "b"}
    names = ["a/one", "b/one", "b/two <b>"]  # as much of the paths as tells them apart
    assert all(name in page.texts for name in names) and HOSTILE in page.texts
    cells = page.cells
    for value in ("3.1 → 0.25", "3.2 → 0.35", "not finished: step 12 of 20", "0.4321 (0.2361 to 0.6281)",
                  "0.5 (0.375 to 0.625), n = 9", "0.75 (0.625 to 0.875), n = 12", "0.25 (0.125 to 0.375)",
                  "50.0 % (25.0 to 75.0)"):  # fmt: skip
        assert value in cells, value
    settings = text[text.index("What differs") : text.index("Curves")]
    assert all(word in settings for word in ("optimizer.learning_rate", "method.train", "lm_head", "documents of data.train"))
    assert not any(word in settings for word in ("method.use_dora", "output_dir", "max_steps", "versions"))
    loss = re.search(r"<figcaption>loss: training.*?</figure>", text, re.S)[0]
    assert re.findall(r'class="line (k\d)"', loss) == ["k1", "k2", "k3"]
    key = re.findall(r'class="key (k\d)"></span>([^<]*)', loss)
    assert key == [("k1", "a/one"), ("k2", "b/one"), ("k3", "b/two &lt;b&gt;")]


def test_the_colour_is_the_runs_where_another_has_no_such_metric(three, tmp_path):
    (three[0] / "metrics.jsonl").write_text("")
    text = compare(three, out=tmp_path / "page.html").read_text()
    loss = re.search(r"<figcaption>loss: training.*?</figure>", text, re.S)[0]
    assert re.findall(r'class="line (k\d)"', loss) == ["k2", "k3"]


def test_the_command_compares(three, capsys):
    assert ftjax("report", *map(str, three)) == 0
    out = capsys.readouterr().out
    assert (three[0].parent / "comparison.html").is_file()
    for text in ("3.2 → 0.35", "optimizer.learning_rate", "0.75 (0.625 to 0.875), n = 12", "f1 on other.jsonl", "50.0 %", "▁"):
        assert text in out, text


def test_refused(three):
    with pytest.raises(UserError, match="given twice"):
        compare([three[0], three[1], three[0] / "final"])
    with pytest.raises(UserError, match="9 runs; at most 8"):
        compare([three[0]] * 9)
    with pytest.raises(UserError, match="no such run"):
        compare([three[0], three[0].parent / "three"])


# ---- ftjax runs ----


def test_runs_are_listed(three, tmp_path, capsys):
    early = write_run(tmp_path / "early", rows=10, training={"max_steps": 20, "metric_for_best_model": "eval/f1"})
    going = write_run(tmp_path / "going", rows=3, final=False)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.yaml").write_text("model: {path: [}")
    (tmp_path / "bad" / "metrics.jsonl").write_text("")
    (tmp_path / "a" / "settings").mkdir()
    (tmp_path / "a" / "settings" / "config.yaml").write_text("of something else")
    with (going / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert ftjax("runs", str(tmp_path)) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert re.search(r"finished +sft +gpt2 +lora +20 +eval/loss 1 +10 +2026-01-01 00:00 +2 h", lines["a/one"])
    assert re.search(r"stopped +sft +gpt2 +full +12 of 20 +eval/loss 1 ", lines["b/two <b>"])
    assert re.search(r"stopped early .* 10 of 20 +train/loss 0.4 ", lines["early"]) and " running " in lines["going"]
    assert "cannot be read" in lines["bad"] and "bad: " in "".join(lines) and not any("settings" in line for line in lines)
    assert early.name in lines


@pytest.mark.parametrize("metric, best", [("eval/reward", ("train/reward", (10, 0.6))), ("eval/f1", ("train/loss", (10, 0.4)))])
def test_the_best_of_a_run_without_evaluations_is_the_same_metric_of_training(metric, best):
    curves = {"train/reward": [(5, 0.1), (10, 0.6)], "train/loss": [(5, 0.5), (10, 0.4)]}
    options = SimpleNamespace(metric_for_best_model=metric, best_is_greatest=True)
    run = SimpleNamespace(config=SimpleNamespace(training=options), curve=lambda name: curves.get(name, []))
    run.best = partial(Run.best, run)
    assert best_of(run) == best


def test_runs_as_json(three, tmp_path, capsys):
    assert ftjax("runs", str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in found] == ["a/one", "b/one", "b/two <b>"] and found[0]["seconds"] == 7200
    assert datetime.fromisoformat(found[0]["started"]).year == 2026


def test_no_runs(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        runs(tmp_path / "none")
    with pytest.raises(UserError, match="no run in it"):
        runs(tmp_path)


def test_a_runs_own_folders_are_not_searched(tmp_path):
    run = write_run(tmp_path / "deep" / "run")
    write_run(run / "checkpoints" / "1")
    write_run(run / "other")
    assert list(find_runs(tmp_path)) == [run, run / "other"] and list(find_runs(run)) == [run, run / "other"]


def test_durations():
    assert [duration(s) for s in (3, 89, 91, 5399, 5401, 130_000)] == ["3 s", "89 s", "1.52 min", "90 min", "1.5 h", "1.5 days"]
