"""Split what a model says into reasoning, content and calls of functions, while it is still saying it."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

THINK = ("<think>", "</think>")


class Call(NamedTuple):
    """A call of a function; `arguments` is JSON text."""

    name: str
    arguments: str


class Said(NamedTuple):
    """A piece of an answer: one of these is set."""

    content: str = ""
    reasoning: str = ""
    call: Call | None = None


@dataclass(frozen=True)
class CallForm:
    """How a family writes calls.

    Attributes:
        opens, closes: texts before and after calls; without `closes` they go on to the answer's end.
        read: the text between them -> calls, or None if it is none.
        whole: an answer that begins with `{` may be a call without `opens`.
        special: `opens` is a special token, which text does not show otherwise.
        around: the marks and texts before and after the arguments of a call of a function of this name, where a call is no JSON
            with its name.
    """

    opens: str
    closes: str | None
    read: Callable[[str], list[Call] | None]
    whole: bool = False
    special: bool = False
    around: Callable[[str], tuple[Sequence[str], Sequence[str]]] | None = None


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    function = value.get("function") if isinstance(value.get("function"), dict) else value
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters", {}))
    if not isinstance(name, str):
        return None
    return Call(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def read_json(body: str) -> list[Call] | None:
    """Read `{"name": ..., "arguments": {...}}`, one or a list of them, or several separated by `;` or line ends."""
    try:
        value = json.loads(body)
    except ValueError:
        value, decoder, at = [], json.JSONDecoder(), 0
        while at < len(body):
            if body[at] in " \n\t;,":
                at += 1
                continue
            try:
                one, at = decoder.raw_decode(body, at)
            except ValueError:
                return None
            value.append(one)
    calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
    return calls if calls and all(calls) else None


def read_xml(body: str) -> list[Call] | None:
    """Read `<function=name><parameter=key>value</parameter></function>`, or else JSON."""
    found = re.fullmatch(r"\s*<function=([^>\s]+)>(.*?)(?:</function>)?\s*", body, re.DOTALL)
    if found is None:
        return read_json(body)
    pairs = re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", found[2], re.DOTALL)
    return [Call(found[1], json.dumps({name: _value(text) for name, text in pairs}, ensure_ascii=False))]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_mistral(body: str) -> list[Call] | None:
    """Read a JSON list, or `name[ARGS]{...}` once or more, with `[TOOL_CALLS]` between."""
    if "[ARGS]" not in body:
        return read_json(body)
    calls = []
    for one in filter(str.strip, body.split("[TOOL_CALLS]")):
        name, _, arguments = one.partition("[ARGS]")
        name = name.partition("[CALL_ID]")[0].strip()
        try:
            calls.append(Call(name, json.dumps(json.loads(arguments), ensure_ascii=False)))
        except ValueError:
            return None
    return calls or None


DEEPSEEK = tuple(f"<\uff5ctool▁{name}\uff5c>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))


def read_deepseek(body: str) -> list[Call] | None:
    """Read `<call begin>name<sep>{...}<call end>`, or `function<sep>name` and a block of JSON, once or more."""
    calls = []
    for one in filter(str.strip, body.replace(DEEPSEEK[3], "").split(DEEPSEEK[2])):
        name, sep, rest = one.partition(DEEPSEEK[4])
        older = re.fullmatch(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", rest, re.DOTALL) if name.strip() == "function" else None
        name, arguments = older.groups() if older else (name.strip(), rest)
        if not sep or not name or not _is_object(arguments):
            return None
        calls.append(Call(name, json.dumps(json.loads(arguments), ensure_ascii=False)))
    return calls or None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _deepseek(template: str) -> CallForm:
    opens, closes, begin, end, sep = DEEPSEEK
    if "```json" in template:
        return CallForm(opens, closes, read_deepseek, special=True, around=lambda name: (
            (opens, begin, "function", sep, f"{name}\n```json\n"), ("\n```", end, closes)
        ))  # fmt: skip
    return CallForm(opens, closes, read_deepseek, special=True, around=lambda name: (
        (opens, begin, name, sep), (end, closes)
    ))  # fmt: skip


def form_of(template: str) -> CallForm | None:
    """Return how models with this chat template write calls; None if the template defines no form that is known."""
    if has_channels(template):
        return CHANNELED
    if DEEPSEEK[0] in template:
        return _deepseek(template)
    if "<tool_call>" in template:
        return CallForm("<tool_call>", "</tool_call>", read_xml)
    if "[TOOL_CALLS]" in template:
        return CallForm("[TOOL_CALLS]", None, read_mistral, special=True)
    if "<|tool_call|>" in template:
        closes = "<|/tool_call|>" if "<|/tool_call|>" in template else None
        return CallForm("<|tool_call|>", closes, read_json, special=True)
    if "<|python_tag|>" in template or '"parameters": dictionary of argument name' in template:
        return CallForm("<|python_tag|>", None, read_json, whole=True, special=True)
    return None


def reasons(template: str) -> bool:
    """Return whether models with this chat template write their reasoning between `<think>` and `</think>`."""
    return THINK[1] in template


def thinks(prompt: str) -> bool:
    """Return whether a prompt ends within reasoning that the template has opened."""
    return prompt.rfind(THINK[0]) > prompt.rfind(THINK[1])


def has_channels(template: str) -> bool:
    """Return whether models with this chat template say everything in channels, as gpt-oss does (`Channels`)."""
    return "<|channel|>" in template and "<|message|>" in template


CHANNELED = CallForm(
    "<|channel|>commentary to=functions.", None, read_json, special=True,
    around=lambda name: (("<|channel|>", f"commentary to=functions.{name} ", "<|constrain|>", "json", "<|message|>"), ()),
)  # fmt: skip


class Channels:
    """Splits one answer in gpt-oss's form (harmony), messages `<|channel|>final<|message|>...<|end|><|start|>assistant`.

    The channel `analysis` is reasoning, a message to `functions.NAME` is a call, and the rest is content.
    """

    ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
    BEGINS = ("<|channel|>", "<|start|>", "assistant", "to=", "<|message|>")

    def __init__(self) -> None:
        self.calls = 0
        self._text, self._kind, self._name = "", "header", ""

    def feed(self, text: str, end: bool = False) -> Iterator[Said]:
        """Yield what is certain now; `end`: nothing follows."""
        self._text += text
        while self._text:
            if self._kind == "header":
                if not self._header(end):
                    return
                continue
            at = min((at for mark in self.ENDS if (at := self._text.find(mark)) >= 0), default=-1)
            if at < 0 and not end and self._kind == "call":
                return
            sure = self._text[:at] if at >= 0 else self._text if end else self._text[: self._certain()]
            self._text = self._text[len(sure) :]
            if sure:
                yield self._said(sure)
            if at < 0:
                return
            mark = next(mark for mark in self.ENDS if self._text.startswith(mark))
            self._text, self._kind = self._text[len(mark) :], "header"

    def _header(self, end: bool) -> bool:
        """Take what stands before a message; return False if more text is needed."""
        begun = self._text.lstrip()
        if begun and not any(begun.startswith(one) or one.startswith(begun) for one in self.BEGINS):
            self._kind = "content"  # no header: under a grammar, for one
            return True
        head, mark, rest = self._text.partition("<|message|>")
        if not mark:
            if end:
                self._text = ""
            return False
        to = re.search(r"to=functions\.([^\s<]+)", head)
        self._text, self._name = rest, to[1] if to else ""
        self._kind = (
            "call" if to else "reasoning" if re.search(r"<\|channel\|>\s*analysis", head) or "to=" in head else "content"
        )
        return True

    def _said(self, text: str) -> Said:
        if self._kind == "call" and _is_object(text):
            self.calls += 1
            return Said(call=Call(self._name, json.dumps(json.loads(text), ensure_ascii=False)))
        return Said(reasoning=text) if self._kind == "reasoning" else Said(content=text)

    def _certain(self) -> int:
        """Return the length of the text without an end that may become a mark."""
        return min(len(self._text) - held_back(self._text, mark) for mark in self.ENDS)


def held_back(text: str, mark: str) -> int:
    """Return the length of the end of the text that may become the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def splitter(template: str, form: CallForm | None, thinking: bool) -> "Speech | Channels":
    """Return what splits an answer of a model with this chat template.

    Args:
        form: how calls are written; None: there are none.
        thinking: the prompt has opened the reasoning already.
    """
    return Channels() if has_channels(template) else Speech(form, reasoning=reasons(template), thinking=thinking)


class Speech:
    """Splits one answer. What may still become a mark is held back, and white space beside marks is left out."""

    def __init__(self, form: CallForm | None = None, *, reasoning: bool = False, thinking: bool = False):
        """
        Args:
            form: how calls are written; None: there are none.
            reasoning: whether the answer may begin with reasoning.
            thinking: the prompt has opened the reasoning already.
        """
        self.calls = 0
        self._form = form
        self._opens = THINK[0] if reasoning and not thinking else None
        self._mode = "reasoning" if thinking else "start"
        self._text = ""

    def feed(self, text: str, end: bool = False) -> Iterator[Said]:
        """Yield what is certain now; `end`: nothing follows."""
        self._text += text
        while (made := self._next(end)) is not None:
            yield from made
        if end and self._text:
            rest, self._text = self._text, ""
            yield Said(reasoning=rest) if self._mode == "reasoning" else Said(content=rest)

    def _next(self, end: bool) -> list[Said] | None:
        """Take the next piece from the text; None if more text is needed."""
        if self._mode == "start":
            return self._start(end)
        if self._mode == "reasoning":
            return self._until(THINK[1], lambda text: Said(reasoning=text), "between", end)
        if self._mode in ("opened", "between"):  # white space beside marks is no part of what was said
            self._text = self._text.lstrip()
            if not self._text and not end:
                return None
            self._mode = "reasoning" if self._mode == "opened" else "content"
            return []
        if self._mode == "call":
            return self._call(end)
        if self._form is None:
            return self._until(None, lambda text: Said(content=text), "content", end)
        return self._until(self._form.opens, lambda text: Said(content=text), "call", end)

    def _start(self, end: bool) -> list[Said] | None:
        begun = self._text.lstrip()
        if not begun and not end:
            return None
        if self._opens is not None and begun.startswith(self._opens):
            self._text, self._mode = begun[len(self._opens) :], "opened"
            return []
        if self._opens is not None and not end and self._opens.startswith(begun):
            return None
        if self._form is not None and self._form.whole and begun.startswith("{"):
            self._mode = "call"
            return []
        self._mode = "content"
        return []

    def _until(self, mark: str | None, made: Callable[[str], Said], then: str, end: bool) -> list[Said] | None:
        at = self._text.find(mark) if mark else -1
        if at >= 0:
            before, self._text, self._mode = self._text[:at].rstrip(), self._text[at + len(mark) :], then
            return [made(before)] if before else []
        sure = self._text if end or not mark else self._text[: self._certain(mark)]
        if not sure:
            return None
        self._text = self._text[len(sure) :]
        return [made(sure)]

    def _certain(self, mark: str) -> int:
        """Return the length of the text without an end that may become the mark, and white space before that."""
        return len(self._text[: len(self._text) - held_back(self._text, mark)].rstrip())

    def _call(self, end: bool) -> list[Said] | None:
        form = self._form
        at = self._text.find(form.closes) if form.closes else -1
        if at < 0 and not end:
            return None
        body = self._text if at < 0 else self._text[:at]
        rest = "" if at < 0 else self._text[at + len(form.closes) :]
        calls = form.read(body.strip()) if body.strip() else None
        self._mode, self._text = "content" if calls is None else "between", rest
        if calls is None:
            opens = "" if form.whole and body.lstrip().startswith("{") else form.opens
            return [Said(content=opens + body + (form.closes if at >= 0 else ""))]
        self.calls += len(calls)
        return [Said(call=call) for call in calls]
