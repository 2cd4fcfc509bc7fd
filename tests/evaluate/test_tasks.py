"""Tests each task's scores against the library that defines them."""

import json
from decimal import Decimal

import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
from rouge_score.rouge_scorer import RougeScorer

from ftjax.config import EvaluateConfig
from ftjax.data.example import Example
from ftjax.errors import UserError
from ftjax.evaluate.rows import Item
from ftjax.evaluate.statistic import compare, intervals
from ftjax.evaluate.tasks import classify, code, match, overlap, own

REFERENCES = [
    ("the cat sat on the mat today", "a cat was sitting on the mat"),
    ("there is no such thing as a free lunch",),
    ("he ran quickly , but to no avail", "he ran fast in vain", "running did not help him"),
    ("Paris is the capital of France .",),
]
SAID = ["the cat sat on a mat", "no such thing as free lunches exists", "he ran fast but it did not help", "Paris"]
OTHER = ["a dog", "there is no such thing as a free lunch", "", "London is not the capital of France ."]
OPTIONS = {"confidence": 0.9, "resamples": 300, "seed": 0}


def items(references, values=None, **example):
    values = values or [{}] * len(references)
    return [
        Item(Example(f"a.jsonl:{n + 1}", references=tuple(one), **example), row)
        for n, (one, row) in enumerate(zip(references, values, strict=True))
    ]


def config(**values) -> EvaluateConfig:
    return EvaluateConfig(**values)


# ---- sacrebleu and rouge-score ----


@pytest.mark.parametrize(
    ("task", "metric", "sentence"),
    [
        (overlap.bleu, sacrebleu.BLEU(), sacrebleu.BLEU(effective_order=True)),
        (overlap.chrf, sacrebleu.CHRF(), sacrebleu.CHRF()),
    ],
    ids=["bleu", "chrf"],
)
def test_corpus_scores_are_sacrebleus(task, metric, sentence):
    """With one, two and three references per row, the statistics that the bootstrap sums give the corpus score."""
    rows = items(REFERENCES)
    streams = [[one[n] if n < len(one) else None for one in REFERENCES] for n in range(3)]
    found = task(rows, SAID, config())
    ((name, value),) = found.values().items()
    assert value == metric.corpus_score(SAID, streams).score
    for row, said, references in zip(found.each, SAID, REFERENCES, strict=True):
        assert row[name] == sentence.sentence_score(said, list(references)).score
    drawn = np.array([0, 0, 2, 3])  # one resample, by hand
    want = metric.corpus_score([SAID[i] for i in drawn], [[stream[i] for i in drawn] for stream in streams]).score
    assert found.combine(found.statistics[drawn].sum(0, keepdims=True))[name][0] == want
    interval = intervals(found, **OPTIONS)[name]
    assert interval.low < value < interval.high
    difference = compare(task(rows, OTHER, config()), found, **OPTIONS)[name]
    assert difference.value == pytest.approx(value - metric.corpus_score(OTHER, streams).score)


def test_rouge_is_rouge_scores():
    found = overlap.rouge(items(REFERENCES), SAID, config(rouge_types=["rouge2", "rougeLsum"], rouge_stemmer=True))
    scorer = RougeScorer(["rouge2", "rougeLsum"], use_stemmer=True)
    want = [scorer.score_multi(list(refs), said) for refs, said in zip(REFERENCES, SAID, strict=True)]
    for name in ("rouge2", "rougeLsum"):
        assert found.values()[name] == pytest.approx(np.mean([one[name].fmeasure for one in want]))
    assert found.values() != overlap.rouge(items(REFERENCES), SAID, config(rouge_types=["rouge2", "rougeLsum"])).values()


# ---- one by one ----


def test_f1_is_squads():
    """F1 agrees with MLQA's script in lm-eval, which is SQuAD's for English."""
    from lm_eval.tasks.mlqa import utils as squad

    texts = [*SAID, "The cat, the hat!", "an apple a day", "42"]
    wanted = ["a cat sat on mats", "no free lunch", "he ran in vain", "paris!", "cat hat", "apple day", "forty two"]
    for said, one in zip(texts, wanted, strict=True):
        assert match.normalized(said) == squad.normalize_answer(said, "en")
        assert match.word_f1(said, one) == pytest.approx(squad.f1_score(said, one, "en"))
    assert match.word_f1("the", "a") == 1 and match.word_f1("", "cat") == 0
    found = match.f1(items([("Paris", "the city of Paris"), ("Rome",)]), ["city of paris!", "Roma"], config())
    assert [row["f1"] for row in found.each] == [1.0, 0.0] and found.values()["exact_match"] == 0.5


@pytest.mark.parametrize(("normalize", "want"), [(True, [1, 1, 0]), (False, [0, 1, 0])])
def test_exact_match(normalize, want):
    rows = items([("The Eiffel Tower",), ("x", "y ")], None) + items([("a b",)])
    found = match.exact_match(rows, ["eiffel  tower.", " y", "ab"], config(normalize=normalize))
    assert [row["exact_match"] for row in found.each] == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("so 3 + 4 = 7\n#### 7", 7), ("#### 1,234", 1234), ("#### $5.50 each", Decimal("5.5")), ("the answer is -3.", -3),
        ("#### 7\n\nQ: more? #### 9", 7), ("it costs $12,000 in 3 years", 3), ("18.0", 18), ("none", None), ("####", None),
    ],
)  # fmt: skip
def test_numbers(text, want):
    assert match.number(text) == want


def test_numeric_answer():
    rows = items([("9 * 2 = 18\n#### 18",)] * 4)
    found = match.numeric_answer(rows, ["#### 18.00", "that is $18", "18 or 19", "#### 18\nand 7 more"], config())
    assert [row["numeric_answer"] for row in found.each] == [1, 1, 0, 1]
    assert [row["numeric_answer_strict"] for row in found.each] == [1, 0, 0, 1]
    with pytest.raises(UserError, match=r"a.jsonl:1.*holds no number"):
        match.numeric_answer(items([("eighteen",)]), ["18"], config())


def test_json_match():
    wanted = {"name": "Ann", "age": 3, "tags": ["a"], "ok": True}
    said = [
        f"Sure:\n```json\n{json.dumps(wanted)}\n```", json.dumps({**wanted, "age": 4}), json.dumps({**wanted, "more": 1}),
        json.dumps({**wanted, "ok": 1}), "{name: Ann}", "[1] {broken {\"name\": \"Ann\"}",
    ]  # fmt: skip
    found = match.json_match(items([(json.dumps(wanted),)] * 6), said, config())
    assert [row["json_match"] for row in found.each] == [1, 0, 0, 0, 0, 0]
    assert [row["json_fields"] for row in found.each] == [1, 0.75, 1, 0.75, 0, 0.25]
    assert [row["json_valid"] for row in found.each] == [1, 1, 1, 1, 0, 1]
    assert found.values()["field/age"] == pytest.approx(3 / 6)
    some = match.json_match(items([(json.dumps(wanted),)] * 6), said, config(fields=["name", "tags"]))
    assert [row["json_match"] for row in some.each] == [1, 1, 1, 1, 0, 0]
    with pytest.raises(UserError, match=r"a.jsonl:1.*no JSON object"):
        match.json_match(items([("[1]",)]), ["{}"], config())


# ---- classes ----


def test_classification_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = ["good", "bad", "so-so"]
    truth = [labels[i] for i in rng.integers(0, 3, 50)]
    logs = rng.normal(0, 1, (50, 3)) + [[2.0 * (label == one) for one in labels] for label in truth]
    rows = items([(label,) for label in truth])
    chosen, found = classify.classification(rows, logs, labels)
    assert chosen == [labels[i] for i in logs.argmax(1)]
    values = found.values()
    assert values["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, chosen))
    assert values["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, chosen, average="macro"))
    assert values["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(truth, chosen))
    drawn = rng.integers(0, 50, 50)  # one resample, by hand
    again = found.combine(found.statistics[drawn].sum(0, keepdims=True))
    resampled = [truth[i] for i in drawn], [chosen[i] for i in drawn]
    assert again["macro_f1"][0] == pytest.approx(sklearn.metrics.f1_score(*resampled, average="macro"))
    assert again["mcc"][0] == pytest.approx(sklearn.metrics.matthews_corrcoef(*resampled))
    matrix = classify.confusion_matrix(rows, chosen, labels)
    assert matrix == sklearn.metrics.confusion_matrix(truth, chosen, labels=labels).tolist()
    np.testing.assert_allclose([sum(row["probabilities"].values()) for row in found.each], 1, atol=1e-5)


def test_classes_of_the_data():
    rows = items([("b",), (" a",), ("b",)])
    assert classify.labels_of(rows, config()) == ["a", "b"]
    assert classify.labels_of(rows, config(labels=["b", "a", "c"])) == ["b", "a", "c"]
    with pytest.raises(UserError, match=r"a.jsonl:2: the class 'a' is not in evaluate.labels"):
        classify.labels_of(rows, config(labels=["b", "c"]))
    with pytest.raises(UserError, match="all rows have the class 'b'"):
        classify.labels_of(items([("b",)]), config())


# ---- programs ----


def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass():
    from itertools import combinations
    from math import comb

    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 1), (3, 2, 2)]:
        draws = [any(one < c for one in draw) for draw in combinations(range(n), k)]
        assert code.pass_at_k(n, c, k) == pytest.approx(sum(draws) / comb(n, k))


def test_code():
    row = {"test": "def check(f):\n    assert f(2) == 4\n", "entry_point": "twice"}
    rows = items([("    return x + x\n",)] * 2, [row, row], prompt="def twice(x):\n")
    whole = "Here:\n```python\nimport math\ndef twice(x):\n    return 2 * x\n```"
    answers = [["    return x + x\n    # more", "    return x"], [whole, "```python\n    return 2*x\n```"]]
    found = code.code(rows, answers, config(num_samples=2, temperature=1.0, pass_at_k=[1, 2]))
    assert [one["outcomes"] for one in found.each] == [["passed", "failed"], ["passed", "passed"]]
    assert found.values() == {"pass@1": 0.75, "pass@2": 1.0, "exact_prefix": 0.25}
    # An indented answer is a body, even if it begins with an import; one at the margin is a complete program.
    inside, outside = "    import math\n    return x + x\n", "\nimport math\ndef twice(x):\n    return x + x\n"
    found = code.code(rows, [[inside, outside]] * 2, config(num_samples=2, temperature=1.0))
    assert [one["outcomes"] for one in found.each] == [["passed", "passed"]] * 2
    forking = "    import os, time\n    if os.fork() == 0: time.sleep(2), os._exit(0)\n    time.sleep(1)\n    return x + x"
    found = [code.code(rows[:1], [[forking]], config(code_processes=most)).each[0]["outcomes"] for most in (1, 2)]
    assert found == [["failed"], ["passed"]]
    with pytest.raises(UserError, match="needs a column 'test'"):
        code.code(items([("x",)]), [["y"]], config())


# ---- custom metrics ----


def test_own_metric(tmp_path):
    file = tmp_path / "brevity.py"
    file.write_text("import math\ndef _n(t): return len(t.split())\ndef shorter(prediction, references, row):\n"
                    "    return {'shorter': _n(prediction) < _n(references[0]), 'x': row['x']}\n")  # fmt: skip
    rows = items([("a b c",), ("a",)], [{"x": 1}, {"x": 2}])
    assert own.own(rows, ["a", "b"], own.load_metric(str(file)), ["?", "?"]).values() == {"shorter": 0.5, "x": 1.5}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "functions found: none"), ("def a(prediction): ...\ndef b(prediction): ...", "functions found: a, b"),
        ("def a(answer): ...", "a takes answer"), ("def a(:", "cannot be imported: SyntaxError"),
        ("def a(prediction): return 'x'", "gave 'x'; expected a number"),
        ("def a(prediction): return 1/0", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_own_metric_that_is_wrong(tmp_path, text, says):
    (tmp_path / "m.py").write_text(text)
    with pytest.raises(UserError, match=says):
        own.own(items([("a",)]), ["a"], own.load_metric(str(tmp_path / "m.py")), ["?"])


def test_a_package_that_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"needs sacrebleu.*pip install 'ftjax\[eval\]'"):
        overlap.bleu(items(REFERENCES), SAID, config())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"task": "blue"}, "known: loss"), ({"num_samples": 4}, "set temperature"), ({"pass_at_k": [2]}, "pass_at_k"),
        ({"labels": ["a", "a"]}, "two classes"),
    ],
)  # fmt: skip
def test_settings_that_contradict(values, says):
    with pytest.raises(ValueError, match=says):
        config(**values)
