"""Tests what each format turns a row into, and the messages for rows that are wrong."""

import pytest

from ftjax.config.data import DataConfig, SourceConfig
from ftjax.data.faults import Faults
from ftjax.data.reader import Reader, to_examples
from ftjax.data.row import Row
from ftjax.data.values import EmptyRow
from ftjax.errors import UserError


def read(values, **source):
    return next(to_examples([Row(values, "a.jsonl:1")], SourceConfig(path="a.jsonl", **source)))


def said(example):
    return [(message["role"], message["content"]) for message in example.messages]


ASKED = [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    "values, prompt, completion, turns",
    [
        ({"prompt": "Q", "completion": "A"}, "Q", "A", ASKED),
        ({"prompt": "Q", "completion": 3}, "Q", "3", [ASKED[0], ("assistant", "3")]),
        ({"prompt": "Q", "completion": True}, "Q", "true", [ASKED[0], ("assistant", "true")]),
        ({"prompt": "Q", "completion": "A", "system": "S"}, "S\n\nQ", "A", [("system", "S"), *ASKED]),
        ({"question": "Q", "answer": "A"}, "Question: Q\nAnswer:", " A", ASKED),
        ({"document": "Q", "summary": "A"}, "Q\nSummary:", " A", ASKED),
        ({"text": "Q", "label": "A"}, "Q\nLabel:", " A", ASKED),
        ({"instruction": "Q", "output": "A"}, "### Instruction:\nQ\n\n### Response:\n", "A", ASKED),
        (
            {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["q", "a"]]},
            "S\n\n### Instruction:\nq\n\n### Response:\na\n\n### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\n",
            "A",
            [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Q\n\nI"), ("assistant", "A")],
        ),
    ],
)
def test_prompts_that_are_text(values, prompt, completion, turns):
    example = read(values)
    assert (example.prompt, example.completion, said(example)) == (prompt, completion, turns)
    assert example.references == (completion.strip(),)


def test_rows_with_images_are_refused():
    said = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "A"},
    ]
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*'image'; only text can be trained"):
        read({"messages": said})
    row = {"prompt": "<image>Q", "completion": "A"}
    with pytest.raises(UserError, match=r'a\.jsonl:1: it has "images", and only text can be trained'):
        read({**row, "images": ["q.png"]})
    assert read({**row, "images": []}).prompt == "<image>Q"


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": TURNS},
        {"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {**TURNS[1], "tool_calls": None}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": TURNS},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": TURNS[:1], "completion": "A"},
        {"prompt": TURNS[:1], "chosen": "A", "rejected": "B"},
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "B"}]},
        {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "B"}]},
    ],
)
def test_conversations(values):
    example = read(values)
    assert said(example) == ASKED and example.references == ("A",)
    assert all(None not in message.values() for message in example.messages)
    if "rejected" in values:
        assert said(example.rejected) == [ASKED[0], ("assistant", "B")]
        assert (example.rejected.where, example.rejected.prompt_turns) == ("a.jsonl:1", 1)
    else:
        assert example.rejected is None
    assert example.prompt_turns == (1 if {"prompt", "chosen"} & values.keys() else None)


def test_a_system_column_opens_a_conversation():
    assert said(read({"messages": TURNS, "system": "S"}))[0] == ("system", "S")
    own = [{"role": "system", "content": "own"}, *TURNS]
    assert said(read({"messages": own, "system": "S"}))[0] == ("system", "own")


def test_a_function_call_of_sharegpt_is_a_tool_call():
    turns = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "A"},
    ]
    example = read({"conversations": turns, "tools": '[{"name": "add", "default": null}]'})
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert example.tools == [{"name": "add", "default": None}]


def test_text_and_tokens():
    assert read({"text": "Once"}).text == "Once"
    tokens = read({"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [0, 1, 1]})
    assert (tokens.input_ids, tokens.labels) == ([2, 3], [2, 3])
    assert read({"input_ids": [1, 2]}).labels == [1, 2]


def test_references_are_kept_for_evaluation():
    assert read({"document": "D", "summary": "S", "references": ["S", "T"]}).references == ("S", "T")


def test_columns_are_mapped():
    example = read({"text": "Q", "label": 1}, columns={"prompt": "text", "completion": "label"})
    assert (example.prompt, example.completion) == ("Q", "1")
    swapped = read({"prompt": "A", "completion": "Q"}, columns={"prompt": "completion", "completion": "prompt"})
    assert (swapped.prompt, swapped.completion) == ("Q", "A")


def test_templates():
    values = {"question": "Q", "answer": "A", "hint": None, "a": "x"}
    example = read(values, template="{question} {hint}{{}}\nAnswer:")
    assert (example.prompt, example.completion) == ("Q {}\nAnswer:", " A")
    assert said(example) == [("user", "Q {}\nAnswer:"), ("assistant", "A")]
    whole = read(values, template="{question}\n", completion_template="<{answer}>")
    assert (whole.prompt, whole.completion) == ("Q\n", "<A>")
    free = read({"x": "1", "y": "2"}, template="{x}+", completion_template="{y}")
    assert (free.prompt, free.completion) == ("1+", "2")
    with pytest.raises(UserError, match=r'a.jsonl:1: the template names "nothing"; found "question"'):
        read(values, template="{nothing}")
    with pytest.raises(UserError, match="no column holds the completion"):
        read({"x": "1"}, template="{x}")
    with pytest.raises(UserError, match="makes a prompt out of columns, but format messages has none"):
        read({"messages": TURNS}, template="{messages}", format="messages")


@pytest.mark.parametrize("template", ["no column", "{}", "{a.b}", "{a!r}", "{a:>9}", "{open"])
def test_a_template_that_is_none_is_refused_with_the_configuration(template):
    with pytest.raises(ValueError, match=r"template|column|expected '}'"):
        DataConfig(train="a.jsonl", template=template)


def test_a_format_can_be_named():
    assert read({"text": "T", "label": "L"}, format="text").text == "T"
    with pytest.raises(UserError, match=r'a.jsonl:1: expected "messages" \(format messages\); found "text"'):
        read({"text": "T"}, format="messages")
    assert DataConfig(train="a", format="alpaca").format == "instruction"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"alpha": "a", "beta": "b"}, r'expected columns .*; found "alpha", "beta". Say which .*: "alpha" \(text\); "beta"'),
        ({"prompt": "Q", "completion": ""}, "'completion' is empty"),
        ({"prompt": "Q", "completion": None}, "'completion' is empty"),
        ({"prompt": "Q", "completion": {"a": 1}}, "'completion' is an object, expected text"),
        ({"prompt": None, "completion": "A"}, "'prompt' is null, expected text"),
        ({"prompt": "Q", "completion": float("nan")}, "'completion' is nan"),
        ({"prompt": "\ud800", "completion": "A"}, "'prompt' holds half of a character"),
        ({"text": "  "}, "'text' is empty"),
        ({"text": 10**5000}, "'text': Exceeds the limit"),
        ({"messages": []}, "expected a list of messages with role and content; found an empty list"),
        ({"messages": "not json"}, "'messages' is not JSON"),
        ({"messages": [{"role": "user"}]}, "message 0: expected content; found keys role"),
        ({"messages": [{"content": "x"}]}, "message 0: expected a role"),
        ({"messages": ["x"]}, "message 0: expected an object with role and content; found 'x'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "message 1 of the assistant is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0: a part of the content is 'image'"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "message 0: the content is dict, not text"),
        ({"messages": [*TURNS, {**TURNS[1], "train": "yes"}]}, "message 2: train is 'yes', expected true or false"),
        ({"messages": [{**TURNS[1], "weight": -1}]}, "message 0: weight is -1"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 0: expected from to be one of .*; found 'alien'"),
        ({"conversations": None}, "expected a list of messages"),
        ({"chosen": "A", "rejected": ""}, "'rejected' is empty, so there is nothing to compare"),
        ({"prompt": "Q", "chosen": None, "rejected": "B"}, "'chosen' is empty, so there is nothing to compare"),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": []}, "'rejected' is empty"),
        ({"chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": " "}]}, "message 1 of the assistant is empty"),
        ({"prompt": "Q", "chosen": {"a": 1}, "rejected": "B"}, "'chosen' is an object, expected an answer as text or messages"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "much"}, "'margin' is 'much', expected a number"),
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "'history' is a list of text, expected a list of"),
        ({"input_ids": []}, "'input_ids' is empty"),
        ({"input_ids": [1.5]}, "'input_ids' is a list of number, expected a list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, r"labels\[1\] is 3, expected -100 \(not trained\) or input_ids\[1\], 2"),
        ({"messages": TURNS, "tools": "["}, "'tools' is not JSON"),
        ({"messages": TURNS, "tools": [1]}, "'tools' is a list of number"),
        ({"messages": TURNS, "chat_template_kwargs": 3}, "'chat_template_kwargs' is a number"),
        ({"text": "a", "label": "b", "references": 3}, "'references' is a number, expected a list of text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(values, message):
    with pytest.raises(UserError, match=rf"^a.jsonl:1: .*{message}|^a.jsonl:1: {message}"):
        read(values)


def test_a_missing_column_of_a_later_row_and_of_the_mapping():
    rows = [Row({"prompt": "Q", "completion": "A"}, "a.jsonl:1"), Row({"prompt": "Q"}, "a.jsonl:2")]
    with pytest.raises(
        UserError, match=r'a.jsonl:2: expected "prompt", "completion" \(format prompt_completion\); found "prompt"'
    ):
        list(to_examples(rows))
    faults = Faults(skip=True)
    assert len(list(to_examples(rows, faults=faults))) == 1 and faults.count == 1
    with pytest.raises(UserError, match=r'a.jsonl:1: data.columns names "label", but the rows have "prompt", "completion"'):
        list(to_examples(rows, SourceConfig(path="a", columns={"completion": "label"})))


def test_an_empty_row_is_told_apart():
    with pytest.raises(EmptyRow):
        read({"text": ""})


def test_columns_that_are_not_used():
    row = Row({"question": "Q", "answer": "A", "id": 3, "hint": "H"}, "a:1")
    reader = Reader(SourceConfig(path="a"), [row])
    reader(row)
    assert reader.unused == ["id", "hint"]
    templated = Reader(SourceConfig(path="a", template="{question} {hint}"), [row])
    templated(row)
    assert templated.unused == ["id"]
    mapped = Reader(SourceConfig(path="a", columns={"prompt": "id", "completion": "hint"}), [row])
    mapped(row)
    assert mapped.unused == ["question", "answer"]


def test_unicode_is_normalised():
    row = Row({"messages": [{"role": "user", "content": "e\u0301"}, {"role": "assistant", "content": "ﬁ"}]}, "a:1")
    import unicodedata

    reader = Reader(SourceConfig(path="a"), [row], lambda text: unicodedata.normalize("NFKC", text))
    assert said(reader(row)) == [("user", "é"), ("assistant", "fi")]
