"""Tests how an answer is split into reasoning, content and calls, whatever the pieces that it comes in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftjax.generate.speech import Speech, form_of, splitter

HERMES = "for the call within <tool_call></tool_call> tags"
LLAMA = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
MISTRAL = "[AVAILABLE_TOOLS] [TOOL_CALLS]"
PHI = "<|tool|><|/tool|><|tool_call|><|/tool_call|>"
CALLS = tuple(f"<\uff5ctool▁{name}\uff5c>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
DEEPSEEK = f"{{{{ '{CALLS[0]}' }}}}"

DEEP = f'{CALLS[2]}f{CALLS[4]}{{"a": 1}}{CALLS[3]}'
HARMONY = "<|start|>assistant<|channel|>final<|message|>"
ONE = '{"name": "f", "arguments": {"a": 1}}'
F = ("f", {"a": 1})

# template, answer, (content, reasoning, calls)
CASES = [
    ("", "Hello <tool_call> there", ("Hello <tool_call> there", "", [])),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", ("", "", [F])),
    (HERMES, f"Let me see.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{ONE}</tool_call>", ("Let me see.", "", [F, F])),
    (HERMES, f"<tool_call>{ONE}", ("", "", [F])),
    (HERMES, f"<tool_call>{ONE}</tool_call>\n\nDone. \n", ("Done. \n", "", [F])),
    (HERMES, "<tool_call>{oops</tool_call> no", ("<tool_call>{oops</tool_call> no", "", [])),
    (HERMES, "a < b <tool", ("a < b <tool", "", [])),
    (
        HERMES,
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\ntwo\nlines\n</parameter>\n</function>\n</tool_call>",
        ("", "", [("f", {"a": 1, "b": "two\nlines"})]),
    ),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', ("", "", [F])),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', ("", "", [F, ("g", {})])),
    (LLAMA, '{"temperature": 3}', ('{"temperature": 3}', "", [])),
    (LLAMA, "It is {warm}.", ("It is {warm}.", "", [])),
    (MISTRAL, f"[TOOL_CALLS][{ONE}]", ("", "", [F])),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x[ARGS]{}', ("", "", [F, ("g", {})])),
    (DEEPSEEK, f"Well.{CALLS[0]}{DEEP}{CALLS[1]}", ("Well.", "", [F])),
    (DEEPSEEK, f"{CALLS[0]}{DEEP}{CALLS[2]}g{CALLS[4]}{{}}{CALLS[3]}{CALLS[1]}", ("", "", [F, ("g", {})])),
    (
        DEEPSEEK,
        f"{CALLS[0]}{CALLS[2]}function{CALLS[4]}f\n```json\n{{\"a\": 1}}\n```{CALLS[3]}{CALLS[1]}",
        ("", "", [F]),
    ),
    (DEEPSEEK, f"{CALLS[0]}{CALLS[2]}f{CALLS[1]}", (f"{CALLS[0]}{CALLS[2]}f{CALLS[1]}", "", [])),
    (HARMONY, "<|channel|>final<|message|>Hello < there", ("Hello < there", "", [])),
    (
        HARMONY,
        "<|channel|>analysis<|message|>Hm <|x|>.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        ("Yes.", "Hm <|x|>.", []),
    ),
    (
        HARMONY,
        "<|channel|>analysis<|message|>f?<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json"
        '<|message|>{"a": 1}',
        ("", "f?", [F]),
    ),
    (HARMONY, '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', ("", "", [F])),
    (HARMONY, "<|channel|>commentary to=functions.f<|message|>{oops<|call|>", ("{oops", "", [])),
    (HARMONY, "<|channel|>commentary<|message|>First this.<|end|><|start|>assistant<|chan", ("First this.", "", [])),
    (HARMONY, '{"temperature": 3}', ('{"temperature": 3}', "", [])),
    (PHI, f"<|tool_call|>[{ONE}]<|/tool_call|>", ("", "", [F])),
    ("<think></think>", "<think>\nHm.\n</think>\n\nYes", ("Yes", "Hm.", [])),
    ("<think></think>", "<thin", ("<thin", "", [])),
    ("<think></think>", "No <think>", ("No <think>", "", [])),
    ("<think></think>", "<think>unfinished </thi", ("", "unfinished </thi", [])),
    ("<think></think>", "  Two\n\n  words \n", ("  Two\n\n  words \n", "", [])),
    (HERMES + "<think></think>", f"<think>f?</think>\n\n<tool_call>{ONE}</tool_call>", ("", "f?", [F])),
]  # fmt: skip


def split(template: str, pieces: list[str], thinking: bool = False) -> tuple[str, str, list]:
    speech = splitter(template, form_of(template), thinking)
    said = [one for piece in pieces for one in speech.feed(piece)] + list(speech.feed("", end=True))
    calls = [(one.call.name, json.loads(one.call.arguments)) for one in said if one.call is not None]
    assert speech.calls == len(calls)
    return "".join(one.content for one in said), "".join(one.reasoning for one in said), calls


@pytest.mark.parametrize(("template", "answer", "want"), CASES, ids=[str(n) for n in range(len(CASES))])
@given(data=st.data())
def test_any_pieces_give_the_same(template, answer, want, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert split(template, pieces) == want


def test_reasoning_that_the_prompt_has_opened():
    assert split("<think></think>", ["So", " it is.</th", "ink>\n\nYes", "."], thinking=True) == ("Yes.", "So it is.", [])


def test_plain_text_is_not_held_back():
    """Each piece is passed on at once, but for what may become a mark."""
    speech = Speech(form_of(HERMES), reasoning=True)
    assert [one.content for one in speech.feed("Hello")] == ["Hello"]
    assert [one.content for one in speech.feed(" a <tool")] == [" a"]
    assert [one.content for one in speech.feed("s>")] == [" <tools>"]
