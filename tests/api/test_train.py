"""Training from Python: settings, rows in memory, the log, and the run that comes back."""

import json
import signal
import subprocess
import sys
import threading

import datasets
import numpy as np
import pandas
import pytest
from oracle import ONE
from tiny_settings import ROWS, SETTINGS
from whole_runs import same_adapter

import ftjax
from ftjax.config import Config
from ftjax.config.load import load_config


def train(config=SETTINGS, **more):
    return ftjax.train(config, devices=ONE, quiet=True, **more)


def test_importing_is_light():
    code = "import sys, ftjax; dir(ftjax); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "pydantic", "transformers", "typer"} & set(done.stdout.split())


def test_a_name_of_a_package_is_a_function_too():
    import inspect

    import ftjax.train.loop as loop

    assert loop.Run is not ftjax.Run
    assert list(inspect.signature(ftjax.train).parameters)[:2] == ["config", "on_log"]
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        ftjax.__getattr__("trian")


def test_rows_in_memory_are_a_file(home):
    """The same rows in a file, a list, a Dataset and a DataFrame: the same run, bit for bit, under a name of the content."""
    split = {"data__validation_split": 3, "training__eval_steps": 2}
    file = train(output_dir="file", **split)
    kinds = {
        "list": ROWS, "dataset": datasets.Dataset.from_list(ROWS), "frame": pandas.DataFrame(ROWS),
        "arrays": [{name: np.str_(text) for name, text in row.items()} for row in ROWS],
    }  # fmt: skip
    names = set()
    for kind, rows in kinds.items():
        run = train(data__train=rows, output_dir=kind, **split)
        same_adapter(file.folder, run.folder)
        assert {name: run.metrics[name].tolist() for name in ("train/loss", "eval/loss")} == {
            name: file.metrics[name].tolist() for name in ("train/loss", "eval/loss")
        }
        names.add(load_config(run.folder / "config.yaml").data.train)
    assert len(names) == 1 and names.pop().startswith("memory:train-")
    record = json.loads((home / "list" / "run.json").read_text())
    assert record["data"]["train"]["source"].startswith("memory:train-") and record["data"]["validation"]["rows"] == 3


def test_a_run_on_rows_in_memory_resumes(home, monkeypatch):
    """It resumes with equal rows as if it had never stopped, and not with others."""

    def stop(row):
        if row["step"] == 3:
            raise RuntimeError("enough")

    whole = train(data__train=ROWS, output_dir="whole", training__save_steps=2)
    with pytest.raises(RuntimeError, match="enough"):
        train(data__train=ROWS, output_dir="parts", training__save_steps=2, on_log=stop)
    with pytest.raises(ftjax.UserError, match=r"data.train: memory:train-\w+ \(before: memory:train-"):
        train(data__train=ROWS[1:], output_dir="parts", training__save_steps=2)
    run = train(data__train=[dict(row) for row in ROWS], output_dir="parts", training__save_steps=2)
    same_adapter(whole.folder, run.folder)
    assert run.steps["train/loss"].tolist() == [1, 2, 3, 4]
    assert run.metrics["train/loss"].tolist() == whole.metrics["train/loss"].tolist()


@pytest.mark.parametrize(
    "rows, said",
    [
        ([*ROWS, {"question": "x", "answer": 3}, "text"], r"expected a configuration|memory|path"),
        ([*ROWS, {"prompt": "x", "completion": 3.5, 4: 5}], r"^memory:train\[12\]: expected a row as a dict"),
        ([*ROWS[:2], {"prompt": "x", "completion": ["a"]}], r"^memory:train\[2\]: "),
        ([{"a": 1, "b": 2}], r'^memory:train\[0\]: expected columns .*; found "a", "b"'),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), r"several sets \(train\); give one, .*\['train'\]"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "read only once"),
        ((row for row in ROWS), "a generator is read only once; give rows"),
        (pandas.Series(["a"]), "a Series is one column; give rows"),
        ([], "an empty list names no data"),
        (lambda: 3, "data.train"),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused_with_their_number(home, rows, said):
    with pytest.raises(ftjax.UserError, match=said):
        train(data__train=rows, output_dir="wrong")
    assert not (home / "wrong" / "final").exists()


def test_parts_of_a_mixture_and_evaluations_may_be_in_memory(home):
    config = {**SETTINGS, "data": {"train": [{"path": ROWS, "weight": 2}, "train.jsonl"], "max_length": 64}}
    seen = ftjax.preview(config, evaluate={"data": ROWS[:2]})
    assert [one["where"] for one in seen["examples"]] == [f"memory:train0[{n}]" for n in range(3)]
    assert seen["train"]["rows"] == 24
    results = ftjax.evaluate("runs/first", ROWS[:5], task="loss", devices=ONE)
    assert results["rows"] == 5 and results["data"].startswith("memory:evaluate-")
    [folder] = (home / "runs/first/evaluation").iterdir()
    assert json.loads((folder / "predictions.jsonl").read_text().splitlines()[4])["where"] == "memory:evaluate[4]"


def test_rows_that_change_or_are_gone_are_refused(home):
    rows = [dict(row) for row in ROWS]
    config = ftjax.preview({**SETTINGS, "data": {"train": rows}}) and {"data__train": rows}
    run = train(output_dir="kept", **config)
    name = run.config.data.train
    rows[3]["completion"] = "other"
    with pytest.raises(ftjax.UserError, match="changed since"):
        ftjax.preview(SETTINGS, data__train=name)
    with pytest.raises(ftjax.UserError, match="which this one is not"):
        ftjax.preview(SETTINGS, data__train="memory:train-0123456789abcdef")


def test_settings_in_python(home):
    """Files, dicts and Configs take the same overrides; names of other tools are known; `${` in a text stays."""
    (home / "run.yaml").write_text(json.dumps(SETTINGS))
    notes = []
    from ftjax.api.settings import settings_of

    more = {
        "lr": np.float32(0.5),
        "method__r": 8,
        "lora_alpha": 4,
        "data": {"dataset": ROWS, "template": "${x} {prompt}"},
    }
    found = [
        settings_of(config, more, note=notes.append)
        for config in ("run.yaml", home / "run.yaml", SETTINGS, Config.model_validate(SETTINGS))
    ]
    assert all(one == found[0] for one in found)
    assert found[0].optimizer.learning_rate == 0.5 and found[0].method.r == 8 and found[0].data.max_length == 1024
    assert found[0].data.template == "${x} {prompt}" and found[0].data.train.startswith("memory:train-")
    assert any("argument lr: lr is read as" in note for note in notes)
    with pytest.raises(ftjax.UserError) as error:
        settings_of(SETTINGS, {"method__rr": 3, "training__max_steps": "many"})
    assert "argument method.rr: method.rr: unknown key" in str(error.value) and "argument training.max_steps" in str(
        error.value
    )
    with pytest.raises(ftjax.UserError, match="found int"):
        settings_of(3)


def test_code_that_a_runs_folder_names_stays_unasked(home):
    """A configuration of somebody's run may not run code here, whatever else is set; what the caller names himself may."""
    from ftjax.api.settings import settings_of

    path = home / "runs/first/config.yaml"
    path.write_text(path.read_text().replace("task: loss", "task: theirs.py"))
    config = ftjax.Run("runs/first").config
    assert config.evaluate.task == "theirs.py" and "evaluate.task" in config.unasked
    assert "evaluate.task" in settings_of(config, {"training__max_steps": 9}).unasked
    assert "evaluate.task" not in settings_of(config, {"evaluate__task": "mine.py"}).unasked


def test_the_log_is_heard_and_the_run_reads_itself(home, capfd, monkeypatch):
    rows = []
    run = train(on_log=rows.append, output_dir="heard", data__validation="train.jsonl", training__eval_steps=2)
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir("/")
        assert run.state == "finished at step 4" and run.folder == home / "heard" == ftjax.Run(run).folder
    assert rows == [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert run.steps["eval/loss"].tolist() == [2, 4] and run.metrics["eval/loss"].dtype == np.float64
    assert run.best == run.folder / "best" and run.final.is_dir() and repr(run) == f"Run({home / 'heard'}: finished at step 4)"
    assert run.model("best").generate("Tom", max_new_tokens=2) == ftjax.load("heard/best").generate("Tom", max_new_tokens=2)
    assert capfd.readouterr().out == ""
    with pytest.raises(ftjax.UserError, match="no best/"):
        ftjax.Run("runs/first").model("best")


def test_a_signal_saves_and_raises(home):
    """Ctrl-C ends the run after its state is saved, and the call raises instead of exiting; in a thread, no signal is taken."""

    def interrupt(row):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(ftjax.Interrupted, match=r"saved step . of 4 .*call ftjax.train as before"):
        train(on_log=interrupt, output_dir="stopped")
    assert ftjax.Run("stopped").state.startswith("not finished")
    thread = threading.Thread(target=train, kwargs={"output_dir": "stopped"})
    thread.start()
    thread.join()
    assert ftjax.Run("stopped").state == "finished at step 4"
