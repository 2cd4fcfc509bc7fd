"""Tests `ftjax evaluate`, from a target and a file to results.json and predictions.jsonl."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from verbs import check, evaluate, ftjax

from ftjax.errors import UserError
from ftjax.evaluate.target import find_target
from ftjax.generate.session import Generator


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def hf_loss(model, tokenizer, prompt: str, completion: str) -> tuple[float, int]:
    """Return the summed loss over the tokens of the completion and EOS, and their number."""
    start = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    picked = logs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[len(start) - 1 :, 0]
    return -picked.sum().item(), len(picked)


# ---- what it measures ----


def test_loss_is_transformers(trained_llama, written, tmp_path):
    rows = [("Once upon a time", ", there was a little girl."), ("Tom and", " Lily"), ("The big dog", " was very happy and")]
    path = written("a.jsonl", *({"prompt": p, "completion": c} for p, c in rows))
    results = evaluate(str(trained_llama), ["evaluate.batch_size=2"], data=path, out=tmp_path / "out")
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(trained_llama), AutoTokenizer.from_pretrained(trained_llama)
    want = [hf_loss(hf, tokenizer, *row) for row in rows]
    assert results["metrics"]["loss"].value == pytest.approx(sum(a for a, _ in want) / sum(n for _, n in want), abs=1e-4)
    for row, (total, count) in zip(predictions(tmp_path / "out"), want, strict=True):
        assert row["scores"]["loss"] == pytest.approx(total / count, abs=1e-4) and row["scores"]["tokens"] == count


def test_loss_is_that_of_training(run, tmp_path):
    """Loss, perplexity and token accuracy equal the run's last evaluation, which was on packed rows of the same data."""
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "eval/loss" in line][-1]
    found = evaluate(str(run), out=tmp_path)["metrics"]
    for name in ("loss", "perplexity", "token_accuracy"):
        assert found[name].value == pytest.approx(last[f"eval/{name}"], rel=1e-4)


def test_a_run_beside_its_base(run, tiny, rows_file, capsys):
    """Files are written to the run's folder; both models answer like `Generator`, on the same prompts."""
    results = evaluate(str(run), ["evaluate.max_new_tokens=6"], task="exact_match", compare_base=True)
    out = capsys.readouterr().out
    folder = run / "evaluation" / f"exact_match-{rows_file.parent.name}-words"
    assert json.loads((folder / "results.json").read_text())["metrics"]["exact_match"]["value"] == 1.0
    rows = predictions(folder)
    prompts = [row["prompt"] for row in rows]
    for prefix, adapter in (("", run / "final"), ("base_", None)):
        want = Generator(str(tiny), adapter, dtype="float32").generate(prompts, max_new_tokens=6)
        assert [row[f"{prefix}prediction"] for row in rows] == [one.text for one in want]
        assert [row[f"{prefix}finish_reason"] for row in rows] == [one.finish_reason for one in want]
    assert rows[0]["references"] == ["yes"] and rows[0]["where"].endswith("words.jsonl:1")
    difference = results["difference"]["exact_match"]
    assert results["base"]["metrics"]["exact_match"].value == 0 and difference.value == difference.low == 1
    assert difference.p_value < 0.01 and "exact_match" in out and "difference" in out


def test_classes_by_likelihood(run, tiny, written, tmp_path, capsys):
    """The class is the likelier completion, EOS included, as computed by transformers with PEFT."""
    from peft import PeftModel

    words = ["abc", "fed", "cab", "dab", "ggg"]
    rows = [{"prompt": f"{word}:", "completion": "yes" if word[0] in "abc" else "no"} for word in words]
    results = evaluate(str(run), data=written("a.jsonl", *rows), task="classification", out=tmp_path / "o", compare_base=True)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    tuned, tokenizer = PeftModel.from_pretrained(base, run / "final"), AutoTokenizer.from_pretrained(run / "final")
    found = predictions(tmp_path / "o")
    for row, one in zip(rows, found, strict=True):
        logs = -np.array([hf_loss(tuned, tokenizer, row["prompt"], label)[0] for label in ("no", "yes")])
        want = np.exp(logs) / np.exp(logs).sum()
        np.testing.assert_allclose([one["scores"]["probabilities"][k] for k in ("no", "yes")], want, atol=1e-4)
        assert one["prediction"] == ("no", "yes")[int(want.argmax())]
    assert [one["prediction"] for one in found[:4]] == ["yes", "no", "yes", "no"]
    matrix = np.array(results["confusion_matrix"])
    assert matrix.sum() == 5 and results["metrics"]["accuracy"].value == np.trace(matrix) / 5
    assert results["labels"] == ["no", "yes"] and "true class" in capsys.readouterr().out


def test_code_and_an_own_metric(tiny, written, tmp_path, monkeypatch):
    monkeypatch.setattr("ftjax.evaluate.measure.Generator.generate", lambda self, prompts, **_: [_answer("  return 4")] * 2)
    row = {"prompt": "def f():\n", "completion": "  return 4", "test": "assert f() == 4"}
    path = written("a.jsonl", row, {**row, "test": "assert f() == 5"})
    with pytest.raises(UserError, match="--allow-code-execution"):
        evaluate(str(tiny), data=path, task="code")
    results = evaluate(str(tiny), data=path, task="code", out=tmp_path / "o", allow_code_execution=True)
    assert results["metrics"]["pass@1"].value == 0.5
    assert [row["scores"]["outcomes"] for row in predictions(tmp_path / "o")] == [["passed"], ["failed"]]
    (tmp_path / "m.py").write_text("def length(prediction, prompt): return len(prediction) + len(prompt)")
    results = evaluate(str(tiny), data=path, task=str(tmp_path / "m.py"), out=tmp_path / "p")
    assert results["metrics"]["length"].value == len("  return 4def f():\n")


def _answer(text):
    from ftjax.generate.answer import Generation

    return Generation(text, [1, 2], "stop", None, 3)


def test_limit_spreads_and_settings_arrive(tiny, written, tmp_path, capsys):
    path = written("a.jsonl", *({"prompt": f"{n}", "completion": "a"} for n in range(10)))
    evaluate(str(tiny), ["evaluate.max_new_tokens=3", "evaluate.seed=7"], data=path, task="f1", limit=4, out=tmp_path / "o",
             as_json=True)  # fmt: skip
    assert [row["prompt"] for row in predictions(tmp_path / "o")] == ["0", "3", "6", "9"]
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["seed"] == 7 and shown["rows"] == 4 and shown["tokens"] <= 12


# ---- what it is given ----


def test_targets(run, tiny, tmp_path):
    for given in (run, run / "final", run / "best"):
        found = find_target(str(given))
        result = run / "final" if given == run else given
        assert (found.model, found.adapter, found.run) == (str(tiny), result, run)
        assert found.base().adapter is None and found.base().model == str(tiny)
    alone = tmp_path / "adapter"
    shutil.copytree(run / "final", alone)
    found = find_target(str(alone))
    assert (found.model, found.adapter, found.run) == (str(tiny), alone, None)
    assert find_target(str(tiny), adapter=alone).adapter == alone
    with pytest.raises(UserError, match="no base model to compare with"):
        find_target(str(tiny)).base()


def test_devices_of_ones_choice(run, tmp_path):
    """The mesh of `evaluate` and of `check` is made of them."""
    chosen = jax.devices()[5:7]
    generator = find_target(str(run)).load(devices=chosen)
    assert all(value.devices() == set(chosen) for value in generator.params.values())
    for verb in (evaluate, check):
        with pytest.raises(UserError, match=r"mesh: fsdp=3 does not use 2 device\(s\) exactly"):
            verb(str(run), ["mesh.fsdp=3"], out=tmp_path, devices=chosen)


def test_a_configuration_means_its_run_and_before_that_its_base_model(run, tiny, tmp_path):
    assert find_target(str(run / "config.yaml"), ["evaluate.task=f1"]).config.evaluate.task == "f1"
    assert find_target(str(run / "config.yaml")).adapter == run / "final"
    notes = []
    other = {**yaml.safe_load((run / "config.yaml").read_text()), "output_dir": str(tmp_path / "new")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(other))
    found = find_target(str(tmp_path / "c.yaml"), note=notes.append)
    assert (found.model, found.adapter) == (str(tiny), None) and "no final/ yet" in notes[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "there is no data; name it with --data FILE"),
        ({"data": "no.jsonl"}, "no.jsonl: no such file"),
        ({"data": "{path}", "task": "blue"}, "known: loss, exact_match"),
        ({"data": "{path}", "task": "no.py"}, "no.py: no such file"),
        ({"data": "{path}", "overrides": ["evaluate.tassk=f1"]}, "did you mean task"),
        ({"data": "{path}", "compare_base": True}, "no base model"),
        ({"data": "{path}", "task": "numeric_answer"}, "holds no number"),
        ({"data": "{path}", "overrides": ["data.max_length=3"]}, "no row has a trained token"),
        ({"data": "{path}", "task": "classification"}, "all rows have the class"),
        ({"data": "{long}", "task": "f1"}, r"long.jsonl:1: prompt 1 has 101 tokens"),
    ],
)
def test_refused(tiny, written, options, says):
    path = written("a.jsonl", {"prompt": "abc", "completion": "de"})
    long = written("long.jsonl", {"prompt": "a" * 100, "completion": "b"})
    options = {name: value.format(path=path, long=long) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(UserError, match=says):
        evaluate(str(tiny), **options)


def test_command_line(tiny, written, tmp_path, capsys):
    path = written("a.jsonl", {"prompt": "abc", "completion": "de"})
    options = ["--data", path, "--task", "chrf", "--out", str(tmp_path / "o")]
    code = ftjax("evaluate", str(tiny), "evaluate.max_new_tokens=2", *options)
    assert code == 0 and "chrf" in capsys.readouterr().out and (tmp_path / "o" / "results.json").is_file()
