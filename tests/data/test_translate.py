"""Tests that messages in other tools' formats keep their meaning: roles, calls, and what is trained."""

import json

import pytest

from ftjax.config.data import SourceConfig
from ftjax.data.faults import Faults
from ftjax.data.reader import Reader, to_examples
from ftjax.data.row import Row
from ftjax.errors import UserError


def read(values, **source):
    return next(to_examples([Row(values, "a.jsonl:1")], SourceConfig(path="a.jsonl", **source)))


def said(example):
    return [(message["role"], message["content"]) for message in example.messages]


def chat(*turns, **flags):
    """Return a row of messages; the flags apply to the last one."""
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[-1] |= flags
    return {"messages": messages}


ASKED = [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize("user", ["user", "User", "HUMAN", " human ", "prompter"])
@pytest.mark.parametrize("answerer", ["assistant", "Assistant", "model", "gpt", "bot", "AI"])
def test_roles_of_other_names(user, answerer):
    assert said(read(chat((user, "Q"), (answerer, "A")))) == ASKED
    turns = [{"from": user, "value": "Q"}, {"from": answerer, "value": "A"}]
    assert said(read({"conversations": turns})) == ASKED


def test_a_template_s_own_roles_stay_and_function_and_developer_do_not():
    example = read(
        chat(("developer", "S"), ("user", "Q"), ("function", "5"), ("ipython", "6"), ("observation", "7"), ("model", "A"))
    )
    assert [m["role"] for m in example.messages] == ["system", "user", "tool", "ipython", "observation", "assistant"]


def test_a_role_that_is_not_known_is_named():
    with pytest.raises(UserError, match=r"a.jsonl:1: message 1: expected from to be one of .*; found 'hummany'"):
        read({"conversations": [{"from": "human", "value": "Q"}, {"from": "hummany", "value": "A"}]})
    with pytest.raises(UserError, match=r"no message is the assistant's, and the role 'asistant' is not known"):
        read(chat(("user", "Q"), ("asistant", "A")))
    rows = [Row(chat(("narrator", "N"), ("user", "Q"), ("assistant", "A")), f"a:{n}") for n in range(3)]
    reader = Reader(SourceConfig(path="a"), rows)
    assert [said(reader(row))[0] for row in rows] == [("narrator", "N")] * 3
    assert reader.unknown_roles == {"narrator": 3}


@pytest.mark.parametrize("name", ["train", "training", "trainable", "train_turn", "loss"])
def test_flags_by_other_names(name):
    for value, trained in ((False, False), (0, False), (True, True), (1, True), (None, None)):
        message = read(chat(*ASKED, **{name: value})).messages[-1]
        assert message.get("train") is trained and not {"training", "trainable", "train_turn", "loss"} & message.keys()
    with pytest.raises(UserError, match=f"message 1: {name} is 0.3, expected true or false"):
        read(chat(*ASKED, **{name: 0.3}))


def test_flags_that_contradict_each_other():
    with pytest.raises(UserError, match="train and loss contradict each other"):
        read(chat(*ASKED, train=True, loss=False))


CALL = {"name": "add", "arguments": {"a": 1}}
CALLS = [{"type": "function", "function": CALL}]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "assistant", "content": "", "function_call": '{"name": "add", "arguments": {"a": 1}}'},
        {"role": "assistant", "content": "", "tool_calls": json.dumps(CALLS)},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "tool_call", "value": '[{"name": "add", "arguments": {"a": 1}}]'},
    ],
)  # fmt: skip
def test_calls_of_other_shapes(turn):
    later = [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "A"}]
    example = read({"messages": [{"role": "user", "content": "Q"}, turn, *later]})
    (call,) = example.messages[1]["tool_calls"]
    assert example.messages[1]["role"] == "assistant" and "function_call" not in example.messages[1]
    assert call["type"] == "function" and call["function"]["name"] == "add" and dict(call["function"]["arguments"]) == {"a": 1}


def test_calls_that_cannot_be_read():
    with pytest.raises(UserError, match="message 0: function_call is 'no', which is not JSON"):
        read({"messages": [{"role": "assistant", "content": "x", "function_call": "no"}]})
    with pytest.raises(UserError, match="function_call and tool_calls are both given"):
        read({"messages": [{"role": "assistant", "content": "", "function_call": CALL, "tool_calls": CALLS}]})


@pytest.mark.parametrize("tools", ["None", "null", "", "nan", None, []])
def test_no_tools_by_any_name(tools):
    assert read({**chat(*ASKED), "tools": tools}).tools is None


def test_tools_as_texts_and_nulls_of_their_own():
    assert read({**chat(*ASKED), "tools": ['{"name": "f", "default": null}']}).tools == [{"name": "f", "default": None}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": {"a": "\ud83d"}}}]}]},
        {"messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]}]},
        {"messages": [{"role": "assistant", "content": "h", "reasoning_content": "\ud83d"}]},
        {**chat(*ASKED), "tools": [{"name": "f", "description": "\ud83d"}]},
        {**chat(*ASKED), "chat_template_kwargs": {"style": "\ud83d"}},
        {"prompt": "Q", "completion": "A", "references": ["\ud83d"]},
        {"instruction": "Q", "output": "A", "history": [["q", "\ud83d"]]},
    ],
)  # fmt: skip
def test_half_of_a_character_is_refused_wherever_it_stands(row):
    with pytest.raises(UserError, match=r"^a.jsonl:1: .*holds half of a character"):
        read(row)
    faults = Faults(skip=True)
    assert not list(to_examples([Row(row, "a.jsonl:1")], faults=faults)) and faults.count == 1


def test_messages_by_columns():
    assert said(read({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}})) == ASKED
    assert said(read({"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}})) == ASKED
