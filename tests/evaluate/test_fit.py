"""Tests warnings and refusals for metrics that do not suit their references."""

import json

import pytest
from verbs import evaluate

from ftjax.data.example import Example
from ftjax.errors import UserError
from ftjax.evaluate.fit import misfits
from ftjax.evaluate.rows import Item

SENTENCES = [f"The {noun} is {what}." for noun in ("cat", "dog", "sun", "sea") for what in ("big", "old", "far", "here")]


def items(*answers):
    return [Item(Example(f"a:{n}", prompt="x", completion=text, references=(text,)), {}) for n, text in enumerate(answers, 1)]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        (SENTENCES, "16 of 16 rows have an answer that no other row has"),
        (["yes"] * 5 + SENTENCES, "16 of 21 rows"),
        (
            ["no", "yes, and so on and on and on until the line has reached its very end"] * 3,
            "not classes: such as 'yes, and so",
        ),
        (["a\nb", "c\nd", "a\nb"], "not classes"),
    ],
)
def test_free_text_is_no_class(answers, says):
    with pytest.raises(UserError, match=rf"{says}.*rouge.*evaluate.labels"):
        misfits("classification", items(*answers), None)
    assert misfits("classification", items(*answers), ["a", "b"]) == []  # named classes are taken as they are


@pytest.mark.parametrize(
    "answers", [["no", "yes"], ["joy"] * 9 + ["fear", "love"], [*"abcdefghij"] * 2, ["a", "b", "b", "a", "c"]]
)
def test_classes(answers):
    assert misfits("classification", items(*answers), None) == []


@pytest.mark.parametrize(
    ("task", "answers", "says"),
    [
        ("classification", SENTENCES[:5], "5 of 5 rows have an answer that no other row has"),
        ("exact_match", [" ".join(["word"] * 30)] * 3, "30 words or more"),
        ("exact_match", ["short"] * 3, None),
        ("bleu", ["one two"] * 3, "runs of 4 words"),
        ("bleu", SENTENCES, None),
        ("rouge", SENTENCES, None),
        ("loss", SENTENCES, None),
    ],
)
def test_warnings(task, answers, says):
    found = misfits(task, items(*answers), None)
    assert (says in found[0] and len(found) == 1) if says else found == []


def test_the_command_says_it(tiny, written, tmp_path, capsys):
    """A refusal comes before a model is loaded; a warning is printed and saved in the results."""
    free = written("free.jsonl", *({"prompt": "a", "completion": text} for text in SENTENCES))
    with pytest.raises(UserError, match="texts, not classes"):
        evaluate(str(tiny), data=free, task="classification")
    few = written("few.jsonl", *({"prompt": "a", "completion": text} for text in "xyz"))
    results = evaluate(str(tiny), data=few, task="classification", out=tmp_path / "out")
    out = capsys.readouterr().out
    assert "warning: evaluate.task classification: 3 of 3 rows" in out
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["warnings"] == results["warnings"] != [] and saved["metrics"]["accuracy"]["rows"] == 3
    written("fields.jsonl", {"prompt": "a", "completion": '{"x": 1}'}, {"prompt": "b", "completion": '{"x": 1, "y": 2}'})
    results = evaluate(
        str(tiny), ["evaluate.max_new_tokens=2"], data=str(tmp_path / "fields.jsonl"), task="json_match", out=tmp_path / "o"
    )
    assert {name: one.rows for name, one in results["metrics"].items()} == {
        "json_valid": 2, "json_match": 2, "json_fields": 2, "field/x": 2, "field/y": 1
    }  # fmt: skip
