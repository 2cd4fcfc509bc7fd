"""Tests which format the rows of a source get, even if some rows are unusual, and the advice if no format fits."""

import re

import pytest
import yaml

from ftjax.config.data import SourceConfig
from ftjax.data.faults import Faults
from ftjax.data.reader import Reader, to_examples
from ftjax.data.row import Row
from ftjax.errors import UserError


def rows(*values):
    return [Row(value, f"a.jsonl:{n}") for n, value in enumerate(values, 1)]


GOOD = {"prompt": "Hi", "completion": "Hello"}
CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}


@pytest.mark.parametrize(
    "values, name",
    [
        ([{}, GOOD], "prompt_completion"),
        ([{"foo": 1}, GOOD, GOOD], "prompt_completion"),
        ([{"messages": None, **GOOD}, {"messages": None, **GOOD}], "prompt_completion"),
        ([{"prompt": None, "completion": "x"}, GOOD], "prompt_completion"),
        ([{"prompt": "p", "completion": None, **CHAT}, {"prompt": None, "completion": None, **CHAT}], "messages"),
        ([{"text": "a", "label": None}, {"text": "b", "label": "x"}], "text_label"),
        ([{"text": "a"}, {"text": "b"}, {"text": "c", "label": "x"}], "text"),
        ([GOOD, GOOD, CHAT], "prompt_completion"),
    ],
)
def test_the_format_is_that_of_most_rows(values, name):
    assert Reader(SourceConfig(path="a"), rows(*values)).name == name


def test_an_odd_first_row_is_an_error_or_skipped_like_any_other():
    for odd in ({}, {"foo": 1}, {"prompt": "Hi"}, CHAT):
        given = rows(odd, GOOD, GOOD)
        with pytest.raises(UserError, match=r'^a.jsonl:1: expected "prompt", "completion" \(format prompt_completion\)'):
            list(to_examples(given))
        faults = Faults(skip=True)
        assert len(list(to_examples(given, faults=faults))) == 2 and faults.count == 1


def test_an_optional_column_that_some_rows_lack_may_be_mapped():
    source = SourceConfig(path="a", columns={"system": "persona"})
    examples = list(to_examples(rows({**GOOD, "persona": "S"}, GOOD), source))
    assert [example.messages[0]["role"] for example in examples] == ["system", "user"]


def test_a_system_column_beside_another_system_message_is_counted():
    own = [{"role": "system", "content": "own"}, *CHAT["messages"]]
    given = rows({"system": "S", "messages": own}, {"system": "own", "messages": own}, {"system": "S", **CHAT})
    reader = Reader(SourceConfig(path="a"), given)
    assert [reader(row).messages[0]["content"] for row in given] == ["own", "own", "S"]
    assert reader.notes == {"system column": 1}


@pytest.mark.parametrize(
    "name", ["completion_mask", "assistant_masks", "assistant_mask", "assistant_tokens_mask", "loss_mask", "labels_mask"]
)
def test_masks_of_tokens(name):
    (example,) = to_examples(rows({"input_ids": [5, 6, 7, 8], name: [0, 0, 1, True]}))
    assert example.labels == [-100, -100, 7, 8]
    both = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], name: [1, 0, 1, 1], "attention_mask": [1, 1, 1, 0]}
    (example,) = to_examples(rows(both))
    assert (example.input_ids, example.labels) == ([5, 6, 7], [-100, -100, 7])
    for wrong, message in (([0, 1], f"2 values of {name} for 4 input_ids"), ([0, 0, 1, 2], "expected a list of 0 and 1")):
        with pytest.raises(UserError, match=message):
            list(to_examples(rows({"input_ids": [5, 6, 7, 8], name: wrong})))


LABELS = ["good", "bad", "bad"] * 4


@pytest.mark.parametrize(
    "values, prompt, answer",
    [
        ([{"instruction": "Q", "context": "", "response": "A", "category": "c"}], "Q", "A"),
        ([{"instruction": "Q", "context": "C", "response": "A", "category": "c"}], "Q\n\nC", "A"),
        ([{"system_prompt": "S", "question": "Q", "response": "A"}], "Q", "A"),
        ([{"article": "Q", "highlights": "A", "id": "1"}], "Q", "A"),
        ([{"query": "Q", "response": "A"}], "Q", "A"),
        ([{"idx": 0, "sentence": "Q", "label": 1}], "Q", "1"),
        ([{"question": "Q", "choices": {"text": ["x"]}, "answerKey": "A"}], "Q", "A"),
        ([{"Prompt": "Q", " completion": "A"}], "Q", "A"),
        ([{"input": "Q", "output": "A"}], "Q", "A"),
        ([{"prompt_id": "7", "user_query": "Q", "model_response": "A", "model": "m"}], "Q", "A"),
        ([{"note: x": "Q", "summary": "A", "url": "u"}], "Q", "A"),
        ([{"dialogue": CHAT["messages"], "id": 3}], "Q", "A"),
        ([{"chat": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}], "Q", "A"),
        ([{"verdict": label, "remark": f"R {n}"} for n, label in enumerate(LABELS)], "R 0", "good"),
        ([{"question": "Q", "accepted": "A", "rejected": "B"}], "Q", "A"),
    ],
)  # fmt: skip
def test_advice_trains_the_right_columns_when_it_is_typed_in(values, prompt, answer):
    with pytest.raises(UserError) as caught:
        Reader(SourceConfig(path="a"), rows(*values))
    advised = re.search(r"data.columns: (\{.*\})$", str(caught.value))[1]
    first = next(to_examples(rows(*values), SourceConfig(path="a", columns=yaml.safe_load(advised))))
    said = [message["content"] for message in first.messages if message["role"] != "system"]
    assert said == [prompt, answer]
    if "system_prompt" in values[0]:
        assert first.messages[0] == {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    "values, message",
    [
        ([{"alpha": "a b c", "beta": "b"}], r'"alpha" \(text, about 3 words\); "beta" \(text\)$'),
        ([{"question": "Q", "context": "C", "answers": {"text": ["A"]}}], r'"answers" \(an object\)$'),
        ([{"Hi": "Bye", "Hello": "Goodbye"}], r"in a CSV file the first line is the names"),
        ([{}], "found no columns. Say which is which"),
    ],
)
def test_without_a_meaning_there_is_a_list_and_no_guess(values, message):
    with pytest.raises(UserError, match=message) as caught:
        Reader(SourceConfig(path="a"), rows(*values))
    assert "such as data.columns" not in str(caught.value)


def test_one_text_is_a_text():
    with pytest.raises(UserError, match=r"data.columns: \{text: story\}$"):
        Reader(SourceConfig(path="a"), rows({"story": "Once"}))
