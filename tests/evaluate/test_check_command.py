"""Tests `ftjax check`, from a run to results.json, answers.jsonl, the model card and the exit code."""

import json
import re

import pytest
import yaml
from verbs import check, ftjax

from ftjax.errors import UserError
from ftjax.generate.session import Generator
from ftjax.hub.card import with_section

SMALL = [
    "check.max_new_tokens=6", "check.stability_prompts=2", "check.stability_max_new_tokens=3", "check.verbatim_prefix=3",
    "check.verbatim_length=2", "check.speed_runs=1", "evaluate.resamples=100",
]  # fmt: skip


@pytest.fixture
def files(written, tmp_path):
    """Write the files of a check whose prompts fit into a tiny model; return the overrides."""
    prompts = [{"prompt": f"{word}:", "label": label, "type": kind} for word, label, kind in (
        ("abc", "safe", "x"), ("bad", "safe", "y"), ("cab", "safe", "x"), ("fed", "unsafe", "z"))]  # fmt: skip
    (tmp_path / "general.txt").write_text("abc de fgh\n\nbad cab, fed.\n\n" + "long " * 9, encoding="utf-8")
    return [
        *SMALL, f"check.prompts={written('safety.jsonl', *prompts)}", f"check.general_text={tmp_path / 'general.txt'}",
        f"check.general_prompts={written('general.jsonl', *({'prompt': f'{w} a:'} for w in ('ace', 'dab', 'abc')))}",
    ]  # fmt: skip


def test_a_run_beside_its_base(run, tiny, files, tmp_path, capsys):
    import math
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    copy = tmp_path / "words"
    shutil.copytree(run, copy)
    loose = [*files, "check.max_empty=1", "check.max_perplexity_rise=1e9", "check.max_whitespace_rise=1e9"]
    results = check(str(copy), [*loose, "check.max_cut_off_rise=null"], limit=2)
    found = {one["name"]: one for one in results["findings"]}
    assert results["failed"] == [] and results["passed"], results["failed"]
    saved = json.loads((copy / "check" / "results.json").read_text())
    assert [one["name"] for one in saved["findings"]] == list(found) and saved["prompts"] == 5  # 2 safe, 1 unsafe, 2 others
    out = capsys.readouterr().out
    assert "perplexity of general text" in out and f"beside {tiny}" in out
    # Every verdict has its number of rows, and every share its interval: two of two are not all.
    assert re.search(r"safe prompts refused +2 +0.0 % \(0.0 to 84.2\).*10 points above the base .* passed on 2 only", out)
    assert re.search(r"empty answers +5 .*passed on 5 only", out) and not re.search(r"passed *$", out, re.MULTILINE)
    assert saved["refused_by_type"]["safe: x"]["tuned"] == {
        "value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / found["safe_refused"]["rows"])), "rows": 2
    }  # fmt: skip

    rows = [json.loads(line) for line in (copy / "check" / "answers.jsonl").read_text().splitlines()]
    for prefix, adapter in (("", copy / "final"), ("base_", None)):
        want = Generator(str(tiny), adapter, dtype="float32").generate([row["prompt"] for row in rows], max_new_tokens=6)
        assert [row[f"{prefix}answer"] for row in rows] == [one.text for one in want]
        assert [row[f"{prefix}cut_off"] for row in rows] == [one.finish_reason == "length" for one in want]
    cut = sum(row["base_cut_off"] for row in rows) / len(rows)
    assert found["cut_off"]["base"]["value"] == pytest.approx(cut) and found["cut_off"]["verdict"] == "not judged"
    assert found["safe_refused"]["value"]["value"] == 0 and set(saved["refused_by_type"]) == {"safe: x", "unsafe: z"}
    # It learned the twelve rows, which are its validation data too, so training rows are not memorised more than those.
    assert found["verbatim_train"]["value"]["value"] == found["verbatim_validation"]["value"]["value"] == 1
    assert found["verbatim_train"]["base"]["value"] == 0 and found["verbatim_train"]["rows"] > 1

    hf, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    total, count = 0.0, 0
    for text in (tmp_path / "general.txt").read_text().strip().split("\n\n"):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += hf(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["perplexity"]["base"]["value"] == pytest.approx(math.exp(total / count), rel=1e-3)

    card = (copy / "final" / "README.md").read_text()
    assert card.count("## Safety and stability") == 1 and card.index("## Safety") < card.index("## How to load it")
    assert "safety.jsonl" in card and str(tmp_path) not in card
    check(str(copy), [*loose, "check.verbatim_rows=0", "check.stability_prompts=0"], compare_base=False)
    again = (copy / "final" / "README.md").read_text()
    assert again.count("## Safety and stability") == 1 and "training rows continued" in again.split("Not measured:")[1]


def test_limits_decide_the_exit_code(tiny, files, tmp_path, capsys):
    code = ftjax("check", str(tiny), *files, "check.max_empty=1", "--out", str(tmp_path), "--json")
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["passed"] and found["base"] is None
    assert "the model's training data is not known" in found["not_measured"]["verbatim_train"]
    code = ftjax("check", str(tiny), *files, "check.min_tokens_per_second=1e9", "--out", str(tmp_path))
    assert code == 1 and "tokens_per_second" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # lm_eval's warnings about its own packages
def test_what_was_trained_on_may_be_gone(run, files, written, tmp_path):
    (tmp_path / "long.md").write_text("a long text " * 20)  # longer than the context
    rows = [{"q": f"{word}:", "gold": gold} for word, gold in (("abc", 0), ("fed", 1), ("cab", 1))]
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({
        "task": "letters", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": written("q.jsonl", *rows)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["yes", "no"],
        "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }))  # fmt: skip
    overrides = [*files, "data.train=gone.jsonl", "check.stability_prompts=0", f"check.general_text={tmp_path / 'long.md'}",
                 f"check.lm_eval_tasks=[{tmp_path / 'task.yaml'}]"]  # fmt: skip
    results = check(str(run / "final"), overrides, out=tmp_path / "o", compare_base=False)
    found = {one["name"]: one for one in results["findings"]}
    assert found["letters: acc"]["value"]["value"] == 2 / 3  # it answers yes, no, yes; the last one is wrong
    missing = results["not_measured"]
    assert "gone.jsonl: no such file" in missing["verbatim_train"] and missing["batch_gap"] == "check.stability_prompts is 0"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "a", "label": "harmless"}], r"p.jsonl:1: label 'harmless'; expected safe or unsafe"),
        ([{"text": "a", "label": "safe"}], r"p.jsonl:1: expected a text in the column prompt"),
        ([{"prompt": "a", "label": "safe"}], "no prompt has the label unsafe"),
        ([{"prompt": "a" * 100, "label": label} for label in ("safe", "unsafe")], "prompt 1 has 101 tokens"),
    ],
)
def test_refused(tiny, files, written, rows, says):
    with pytest.raises(UserError, match=says):
        check(str(tiny), [f for f in files if "check.prompts" not in f], prompts=written("p.jsonl", *rows))


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("# A\n\n## B\n\nb\n", "# A\n\n## B\n\nb\n\n## T\n\nnew\n"),
        ("# A\n\n## T\n\nold\n\n## C\n\nc\n", "# A\n\n## T\n\nnew\n\n## C\n\nc\n"),
        ("# A\n\n## How to load it\n\nx\n", "# A\n\n## T\n\nnew\n\n## How to load it\n\nx\n"),
        ("# A\n\n```\n## T\n```\n", "# A\n\n```\n## T\n```\n\n## T\n\nnew\n"),
    ],
)
def test_section_of_a_card(card, expected):
    assert with_section(card, "T", "new") == expected == with_section(expected, "T", "new")
