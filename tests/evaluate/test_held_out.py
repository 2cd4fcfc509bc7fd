"""Tests evaluation on the rows that a run has held out, and names of runs that do not exist."""

import json

import pytest
from oracle import ONE
from verbs import check, evaluate, generate

import ftjax.evaluate.check.command as command
from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.evaluate.observe import make_observer
from ftjax.generate.named import find_named
from ftjax.hub.export import export
from ftjax.report.command import report
from ftjax.train.run import train


@pytest.fixture(scope="module")
def rows():
    """Return 40 rows, of which one repeats another and one is empty."""
    found = [{"prompt": f"{a}{b}:", "completion": c} for a in "abcde" for b in "fghij" for c in ("no", "yes")][:38]
    return [*found[:20], {"prompt": "", "completion": ""}, *found[20:], found[3]]


@pytest.fixture(scope="module")
def split_run(tiny, rows, tmp_path_factory):
    """Train with eight rows held out, evaluation at the end, and the task measured during training; return `(run, data, rows of
    the task)`."""
    folder = tmp_path_factory.mktemp("split")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate({
        "model": {"path": str(tiny), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "data": {"train": str(data), "validation_split": 8, "max_length": 32, "drop_empty": True},
        "training": {"max_steps": 4, "global_batch_size": 4, "eval_steps": 2, "report_to": [], "seed": 5},
        "evaluate": {"training_rows": 100, "training_examples": 0, "max_new_tokens": 2, "task": "f1"},
        "output_dir": str(folder / "run"),
    })  # fmt: skip
    seen = []
    train(config, devices=ONE, make_observer=lambda *given: seen.append(make_observer(*given)) or seen[0])
    return folder / "run", data, [item.where for item in seen[0].items]


def test_rows_are_those_that_training_held_out(split_run, rows, tmp_path):
    """The loss is that of training, no held-out pair was trained, and the task during training saw the same rows."""
    run, data, observed = split_run
    found = evaluate(str(run), task="loss", out=tmp_path / "out")
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "eval/loss" in line][-1]
    assert found["metrics"]["loss"].value == pytest.approx(last["eval/loss"], rel=1e-4)
    assert found["rows"] == 8 and found["rows_left_out"] == 0 and found["data"].endswith("rows.jsonl (validation_split)")
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    asked = [(line["prompt"], line["references"][0]) for line in lines]
    places = [int(line["where"].rpartition(":")[2]) for line in lines]
    assert asked == [(rows[n - 1]["prompt"], rows[n - 1]["completion"]) for n in places]
    record = json.loads((run / "run.json").read_text())["data"]
    assert record["train"]["kept"] + record["validation"]["kept"] == 39
    rest = [(row["prompt"], row["completion"]) for n, row in enumerate(rows, 1) if n not in places and row["prompt"]]
    assert len(rest) == record["train"]["kept"] == 31 and not set(rest) & set(asked)
    assert observed == [line["where"] for line in lines]
    again = evaluate(str(run / "final"), ["data.max_length=20", "evaluate.data=null"], task="loss", limit=3, out=tmp_path / "b")
    assert again["rows"] == 3  # another maximum length does not change the split
    assert evaluate(str(run), task="loss", data=str(data), out=tmp_path / "c")["rows"] == 39


@pytest.mark.parametrize("asked", ["data.validation_split=9", "training.seed=6", "data.train=other.jsonl"])
def test_another_split_would_hold_trained_rows(split_run, asked):
    with pytest.raises(UserError, match=rf"{asked.partition('=')[0]}: \S+ is asked for, and the run has .*--data FILE"):
        evaluate(str(split_run[0]), [asked])


def test_other_data_than_trained_on(split_run, tmp_path):
    run, data, _ = split_run
    text = data.read_text()
    try:
        data.write_text(text.replace('"bf:"', '"zf:"'))
        with pytest.raises(UserError, match=r"rows.jsonl .* have changed since this run trained .*--data FILE"):
            evaluate(str(run), out=tmp_path)
    finally:
        data.write_text(text)


@pytest.fixture
def continued(monkeypatch, written, tmp_path):
    """Return `continued(run, overrides)`: the texts that `ftjax check` has the model continue, and reasons for those that are
    missing."""
    general = written("general.jsonl", {"prompt": "abc"})
    (tmp_path / "general.txt").write_text("abc de fgh")
    small = [
        f"check.general_prompts={general}", f"check.general_text={tmp_path / 'general.txt'}", "check.max_new_tokens=2",
        "check.stability_prompts=0", "check.verbatim_prefix=1", "check.verbatim_length=1", "evaluate.resamples=100",
    ]  # fmt: skip

    def ask(run, overrides):
        found, examine = {}, command.examine

        def seen(generator, material, data, *rest):
            for name, pieces in data.items():
                found[name] = {
                    tuple(generator.tokenizer.decode(ids, skip_special_tokens=True) for ids in (piece.prompt, piece.following))
                    for piece in pieces
                }
            return examine(generator, material, {}, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(command, "examine", seen)
            results = check(str(run), [*small, *overrides], compare_base=False, out=tmp_path / "out")
        return found, results["not_measured"]

    return ask


def test_a_check_continues_rows_as_training_divided_them(split_run, rows, continued, tmp_path):
    """Neither other settings of the command nor the same rows in another file change what was held out."""
    run, data, held = split_run
    held = {int(where.rpartition(":")[2]) for where in held}
    want = {True: set(), False: set()}
    for number, row in enumerate(rows, 1):
        if row["prompt"]:
            want[number in held].add((row["prompt"], row["completion"][0]))
    moved = tmp_path / "moved.jsonl"
    moved.write_text(data.read_text())
    for given in (["data.max_length=5", "data.drop_empty=false"], [f"data.train={moved}"]):
        found, _ = continued(run, given)
        assert found == {"train": want[False], "validation": want[True]}
    moved.write_text(data.read_text().replace('"bf:"', '"zf:"'))
    found, missing = continued(run, [f"data.train={moved}"])
    assert not found and "moved.jsonl (or the tokenizer" in missing["verbatim_train"]


@pytest.mark.parametrize("asked", ["data.validation_split=9", "training.seed=6"])
def test_a_check_of_another_split_would_count_trained_rows_as_held_out(split_run, continued, asked):
    with pytest.raises(UserError, match=rf"{asked.partition('=')[0]}: \S+ is asked for, .*or set check.verbatim_rows=0"):
        continued(split_run[0], [asked])
    assert continued(split_run[0], [asked, "check.verbatim_rows=0"])[0] == {}


# ---- runs that do not exist ----


@pytest.mark.parametrize("name", ["runs/nope", "runs/nope/final", "runs/nope/best"])
@pytest.mark.parametrize("there", [True, False])
def test_no_such_run(name, there, tmp_path, monkeypatch):
    """The error does not depend on the folder `runs`, and the Hub is not asked."""
    monkeypatch.chdir(tmp_path)
    if there:
        for one in ("first", "second"):
            (tmp_path / "runs" / one).mkdir(parents=True)
            (tmp_path / "runs" / one / "config.yaml").write_text("model: {path: x}\ndata: {train: y}\n")
    says = rf"{name}: there is no such run \({'the runs in runs are first, second' if there else 'runs holds no run'}"
    for verb in (
        lambda: evaluate(name), lambda: check(name), lambda: generate(name, prompt=["a"]), lambda: find_named(name),
        lambda: export(name, tmp_path / "out"), lambda: generate("a", adapter=tmp_path.__class__(name), prompt=["a"]),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            verb()
    with pytest.raises(UserError, match=f"{name}: there is no such run"):
        report(tmp_path.__class__(name))
    assert not (tmp_path / "out").exists()


def test_what_may_be_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("org/model", "gpt2", "org/final", "https://huggingface.co/runs/nope"):
        assert find_named(given).model == given
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("model: {path: x}\ndata: {train: y}\n")
    with pytest.raises(UserError, match="this run has no best/; train it to its end first"):
        find_named("runs/first/best")
