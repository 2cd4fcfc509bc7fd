"""Tests of counterfactual prompts: what is read, what is measured, and what the check says about it."""

import json
import re

import numpy as np
import pytest
from verbs import check

from ftjax.errors import UserError
from ftjax.evaluate.check.counterfactual import Measured, Varied, by_axis, gaps, gather, sentiment
from ftjax.evaluate.check.words import BLAME, ENDINGS, PERSONS, PRAISE, QUESTIONS


def table(rows: list[tuple[float, ...]], kind: str = "sentiment") -> tuple[list[Varied], Measured]:
    """Return prompts of groups a, b, ... with these values; a row is a set."""
    varied = [Varied("axis", f"set {n}", "abcdef"[g], "x") for n, row in enumerate(rows) for g in range(len(row))]
    return varied, Measured([{kind: value} for row in rows for value in row], [""] * len(varied))


def test_prompts_of_a_set_differ_in_the_person_alone():
    varied = gather("built_in")
    assert {one.axis for one in varied} == {"name", "gender", "origin", "age", "religion", "disability"}
    assert len({one.set for one in varied}) == len(PERSONS) * (len(QUESTIONS) + len(ENDINGS))
    for axis, groups in PERSONS.items():
        words = [word for group in groups.values() for word in group]
        rest = set()
        for one in varied:
            if one.set == f"{axis} 2":
                person = max((w for w in words if w.lower() in one.text.lower()), key=len)
                rest.add(re.sub(re.escape(person), "", one.text, flags=re.IGNORECASE))
        assert len(rest) == 1


def test_a_file_of_prompts(written):
    path = written("own.jsonl", *(
        {"set": n, "group": group, "prompt": f"Ask {group} {n}", "axis": "team", "stereotyped": ending, "neutral": other}
        for n in (1, 2) for group, (ending, other) in (("red", ("bad", "ok")), ("blue", ("bad", "ok")))
    ))  # fmt: skip
    varied = gather(str(path))
    assert [(one.axis, one.set, one.group) for one in varied[:2]] == [("team", "team 1", "red"), ("team", "team 1", "blue")]
    assert varied[0].endings == ("bad", "ok")


@pytest.mark.parametrize("row, message", [
    ({"group": "a", "prompt": "x"}, "set is missing"),
    ({"set": 1, "group": "a", "prompt": "x", "neutral": "y"}, "give both or neither"),
    ({"set": 1, "group": "a", "prompt": "x"}, "the set 'all 1' has one group"),
])  # fmt: skip
def test_a_file_that_is_wrong(row, message, written):
    with pytest.raises(UserError, match=message):
        gather(str(written("own.jsonl", row)))


def test_sentiment_counts_praise_and_blame():
    assert sentiment("A reliable and honest engineer.") == 1
    assert sentiment("Lazy, but clever") == 0 and sentiment("A lazy, dishonest, kind one") == pytest.approx(-1 / 3)
    assert sentiment("") == sentiment("the table") == 0
    assert not PRAISE & BLAME


def test_gaps_are_of_the_means_of_groups():
    varied = [Varied("x", "x 1", group, "?") for group in ("a", "a", "b")]
    found = gaps(varied, Measured([{"length": 10}, {"length": 30}, {"length": 10}], [""] * 3)).values()
    assert found == {"bias_length": pytest.approx(0.5)}  # 20 and 10 tokens
    assert gaps(*table([(0.0, 1.0), (0.5, 0.5)])).values() == {"bias_sentiment": 0.5}


def test_a_group_that_is_always_ahead_is_seen():
    rng = np.random.default_rng(0)
    ahead = [(x, x + 0.5, x + 0.1) for x in rng.random(12)]
    chance = [tuple(rng.random(3)) for _ in range(12)]
    assert by_axis(*table(ahead))["axis"]["sentiment"]["p_value"] < 0.001
    assert by_axis(*table(chance))["axis"]["sentiment"]["p_value"] > 0.05
    two = by_axis(*table([(x, x + 0.5) for x in rng.random(12)]))["axis"]["sentiment"]
    assert two["p_value"] < 0.01 and two["sets"] == 12 and two["groups"]["b"] - two["groups"]["a"] == pytest.approx(0.5)
    assert by_axis(*table([(0.5, 0.5)] * 5))["axis"]["sentiment"]["p_value"] is None


def test_a_run_beside_its_base(run, written, tmp_path, capsys):
    rows = [{"set": n, "group": group, "prompt": f"{text}:"} for n in (1, 2, 3) for group, text in (("a", "abc"), ("b", "bad"))]
    rows += [{"set": 4, "group": g, "prompt": f"{g}:", "stereotyped": "bad", "neutral": "cab"} for g in ("abc", "fed")]
    given = [
        f"check.counterfactual={written('own.jsonl', *rows)}",
        f"check.general_prompts={written('g.jsonl', {'prompt': 'ace a:'})}",
        f"check.general_text={written('t.jsonl', {'text': 'abc de'})}", "check.max_new_tokens=4", "check.stability_prompts=0",
        "check.verbatim_rows=0", "evaluate.resamples=100",
    ]  # fmt: skip
    results = check(str(run), [*given, "check.max_bias_likelihood_rise=0"], out=tmp_path / "out")
    found = {one["name"]: one for one in results["findings"]}
    gap = found["bias_likelihood"]
    assert gap["rows"] == 1 and gap["rule"] == "at most 0 above the base" and found["bias_length"]["rows"] == 3
    assert (
        (gap["verdict"] == "failed")
        == (gap["value"]["value"] > gap["base"]["value"] + 1e-9)
        == ("bias_likelihood" in results["failed"])
    )
    assert set(results["counterfactual"]) == {"tuned", "base"} and "differs in" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "counterfactual.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {"answer", "base_answer", "sentiment", "base_length"} <= lines[0].keys()
    assert lines[-1]["endings"] == ["bad", "cab"] and lines[-1]["likelihood"] != lines[-1]["base_likelihood"]
