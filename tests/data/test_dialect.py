"""Tests messages in the form that a chat template expects, and what the template leaves out."""

import json
from dataclasses import replace

import pytest
from data_tokenizers import CHATML, WITH_TOOLS, byte_level
from transformers.utils.chat_template_utils import render_jinja_template

from ftjax.config.data import DataConfig
from ftjax.data.encode import Encoder
from ftjax.data.faults import Faults
from ftjax.data.pipeline import load_splits
from ftjax.data.reader import to_examples
from ftjax.data.row import Row
from ftjax.data.template import example_prompt, render_prompt
from ftjax.errors import UserError


def frame(content: str) -> str:
    """Return a ChatML conversation with this in place of the content."""
    return CHATML.replace("{{ m.content }}", content)


CALLS = "{% for c in m.tool_calls or [] %}"
ARGUMENTS = "c.function.name + ' ' + "
IF_NONE = frame(
    "{% if m.content is none %}" + CALLS + "{{ " + ARGUMENTS + "(c.function.arguments | tojson) }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}"
)
IF_NONE_TEXT = frame(
    "{% if m.content is none %}" + CALLS + "{{ " + ARGUMENTS + "c.function.arguments }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}"
)
PRINTS = frame("{{ m.content }}" + CALLS + "{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}")
PRINTS_TEXT = frame("{{ m.content }}" + CALLS + "{{ c.function.name }} {{ c.function.arguments }}{% endfor %}")
ADDS = frame("{{ '' + m.content }}" + CALLS + "{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}")
EITHER = frame(
    "{{ m.content or '' }}" + CALLS + "{{ c.function.name }} {% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}"
)
ITEMS = frame(
    "{{ m.content or '' }}" + CALLS + "{{ c.function.name }} {% for k, v in c.function.arguments.items() %}"
    "{{ '{' }}\"{{ k }}\": \"{{ v }}\"{{ '}' }}{% endfor %}{% endfor %}"
)
TEMPLATES = {"if none": IF_NONE, "if none, text": IF_NONE_TEXT, "prints": PRINTS, "prints text": PRINTS_TEXT, "adds": ADDS,
             "either": EITHER, "items": ITEMS}  # fmt: skip


def call(arguments, content=None):
    function = {"name": "f", "arguments": arguments}
    said = {"role": "assistant", "content": content, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    return [{"role": "user", "content": "go"}, said]


def encoded(template, messages, **values):
    tokenizer, encoder = byte_level(template), Encoder(byte_level(template))
    document = encoder([next(to_examples([Row({"messages": messages, **values}, "a.jsonl:1")]))])[0]
    return tokenizer.decode(document.tokens[document.weights > 0].tolist()), encoder.notes


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("given", [{"city": "Oslo"}, '{"city": "Oslo"}'], ids=["object", "text"])
def test_a_call_without_content(template, given):
    assert encoded(TEMPLATES[template], call(given))[0] == 'f {"city": "Oslo"}<|im_end|>\n'


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "items"])
@pytest.mark.parametrize("given", [None, "", " ", {}, "{}"])
def test_a_call_without_arguments(template, given):
    assert encoded(TEMPLATES[template], call(given))[0] == "f {}<|im_end|>\n"


def test_the_arguments_text_is_taken_as_it_was_written():
    text = '{"b":1,  "a": "é"}'
    assert encoded(PRINTS_TEXT, call(text))[0] == f"f {text}<|im_end|>\n"
    assert encoded(PRINTS, call("no json"))[0] == 'f "no json"<|im_end|>\n'


def test_a_null_content_reaches_a_template_that_asks_for_it_as_in_transformers():
    messages = call({"city": "Oslo"})
    whole = render_jinja_template([messages], chat_template=IF_NONE)[0][0]
    text = encoded(IF_NONE, messages)[0]
    assert whole.endswith(text) and "Oslo" in text


def test_generation_gives_the_template_the_same():
    talk = [*call('{"city": "Oslo"}'), {"role": "tool", "content": "5C"}, {"role": "assistant", "content": "It is 5C."}]
    for template in TEMPLATES.values():
        tokenizer = byte_level(template)
        example = next(to_examples([Row({"messages": talk}, "a:1")]))
        document = Encoder(tokenizer)([example])[0]
        prompt = example_prompt(example, tokenizer)
        assert document.tokens[: len(prompt)].tolist() == prompt and "Oslo" in tokenizer.decode(prompt)


def test_an_absent_content_is_left_out_where_the_template_asks_whether_it_is_there():
    """A null content is dropped, as `apply_chat_template` drops every null."""
    template = frame(
        "{% if m.content is defined %}said {{ m.content }}{% endif %}" + CALLS + "{{ c.function.name }}{% endfor %}"
    )
    messages = call({"city": "Oslo"})
    whole = byte_level(template).apply_chat_template(messages, tokenize=False)
    assert encoded(template, messages)[0] == "f<|im_end|>\n" and whole.endswith("assistant\nf<|im_end|>\n")


# What a template leaves out


def test_a_call_that_is_left_out_is_an_error():
    for content in (None, "", "I look."):
        with pytest.raises(UserError, match=r"a.jsonl:1: the chat template does not write tool_calls.*model.chat_template"):
            encoded(CHATML, call({"city": "Oslo"}, content))
    quiet = call({"city": "Oslo"}, "I look.")
    quiet[1]["train"] = False  # it is not trained
    assert encoded(CHATML, [*quiet, {"role": "user", "content": "go"}, {"role": "assistant", "content": "fine"}])
    faults = Faults(skip=True)
    rows = [Row({"messages": call({"city": "Oslo"})}, "a:1")]
    assert Encoder(byte_level(CHATML))(list(to_examples(rows)), faults) == [None] and faults.count == 1


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_that_is_left_out(field):
    said = {"role": "assistant", "content": "2", field: "easy"}
    text, notes = encoded(CHATML, [{"role": "user", "content": "1+1"}, said])
    assert notes["reasoning left out"] == 1 and text == "2<|im_end|>\n"
    with pytest.raises(UserError, match=f"does not write {field}"):
        encoded(CHATML, [{"role": "user", "content": "1+1"}, {**said, "content": None}])
    writes = frame("{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}")
    text, notes = encoded(writes, [{"role": "user", "content": "1+1"}, said])
    assert text == "(easy)2<|im_end|>\n" and not notes["reasoning left out"]


def test_tools_that_are_left_out():
    tools = [{"type": "function", "function": {"name": "add"}}]
    talk = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "fine"}]
    assert encoded(CHATML, talk, tools=tools)[1]["tools left out"] == 1
    assert not encoded(WITH_TOOLS, talk, tools=tools)[1]["tools left out"]
    assert not encoded(CHATML, talk)[1]["tools left out"]


def test_a_part_of_an_answer_that_is_left_out():
    strips = frame("{{ m.content.split('</think>')[-1] | trim }}")
    talk = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "<think>a</think>\n\nfine "}]
    assert encoded(strips, talk)[1]["answer left out"] == 1
    assert not encoded(CHATML, talk)[1]["answer left out"]
    assert not encoded(strips, [talk[0], {"role": "assistant", "content": " fine "}])[1]["answer left out"]


# System messages


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML,
        "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + CHATML,
    ],
    ids=["refused", "left out"],
)
def test_a_system_message_goes_before_the_first_users(template):
    tokenizer, system = byte_level(template), {"role": "system", "content": "Be kind."}
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "fine"}]
    folded = [{"role": "user", "content": "Be kind.\n\nHello"}, talk[1]]
    encoder = Encoder(tokenizer)
    for values in (
        {"messages": [system, *talk]},
        {"prompt": [system, talk[0]], "completion": talk[1:]},
        {"messages": talk, "system": "Be kind."},
        {"instruction": "Hello", "output": "fine", "system": "Be kind."},
    ):
        encoder.notes.clear()
        example = next(to_examples([Row(json.loads(json.dumps(values)), "a:1")]))
        document = encoder([example])[0]
        assert tokenizer.decode(document.tokens) == tokenizer.apply_chat_template(folded, tokenize=False)
        assert tokenizer.decode(document.tokens[document.weights > 0]) == "fine<|im_end|>\n"
        assert encoder.notes["system folded"] == 1
        prompt = example_prompt(example, tokenizer)
        assert document.tokens[: len(prompt)].tolist() == prompt == render_prompt([system, talk[0]], tokenizer)

        strict = replace(example, fold_system=False)
        for refused in (lambda one=strict: encoder([one]), lambda one=strict: example_prompt(one, tokenizer)):
            with pytest.raises(UserError, match=r"takes no system message, and data\.fold_system is false; .*chat_template"):
                refused()


def test_a_set_may_leave_out_rows_whose_system_message_is_not_taken(tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": talk}, {"messages": [{"role": "system", "content": "c"}, *talk]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for strict, kept in ((True, 1), (False, 2)):
        config = DataConfig(train=str(path), fold_system=not strict, on_error="skip")
        assert load_splits(config, byte_level(refuses), seed=0)[0].report.documents == kept
    with pytest.raises(UserError, match=r"a.jsonl:2: .*fold_system"):
        load_splits(DataConfig(train=str(path), fold_system=False), byte_level(refuses), seed=0)


def test_a_system_message_that_is_taken_stays():
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, notes = encoded(CHATML, talk)
    assert not notes["system folded"]
    refuses_all = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="the chat template refuses these messages: no"):
        encoded(refuses_all, talk)
