"""What a chat template takes: no content or an empty one, a call's arguments as an object or as JSON text, a system message.

Data comes with one of these and templates are written for one of these. What a template does with each is tried, and it is
given what it can write.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from ftjax.data.example import Message
from ftjax.errors import UserError

SENTINEL = "qZ7answerQz9"  # stands in no template, and none changes it
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
Render = Callable[[Sequence[Message]], str]


class Arguments(dict):
    """Of a tool call, as an object; `text` is the JSON text that it was given as."""

    text: str = "{}"

    @classmethod
    def read(cls, given: Any) -> Any:
        """No arguments are an empty object. What is no object in JSON stays as it is."""
        if given is None or (isinstance(given, str) and not given.strip()):
            return cls()
        if isinstance(given, str):
            try:
                value = json.loads(given)
            except (ValueError, RecursionError):
                return given
            if not isinstance(value, dict):
                return value
            made = cls(value)
            made.text = given
            return made
        return given


def fold_system(messages: Sequence[Message]) -> list[Message] | None:
    """The system message in front of the first user's, as Gemma 3's own template writes it; None where there are not both."""
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or messages[0]["role"] != "system" or not isinstance(messages[first].get("content"), str):
        return None
    asked = {**messages[first], "content": f"{messages[0].get('content') or ''}\n\n{messages[first]['content']}"}
    return [*messages[1:first], asked, *messages[first + 1 :]]


def fit_calls(messages: Sequence[Message], render: Render) -> list[Message]:
    """The messages with calls and absent contents in the form that the template writes.

    An absent content is null for a template that asks for that, and left out or else empty where the template fails at null or
    would write the word None. Arguments are objects, and JSON text where the template fails at objects or writes Python's form
    of them.
    """
    given, silent = list(messages), any(message.get("content") is None for message in messages)
    arguments = [value for message in messages for value in _arguments(message)]
    if not silent and not arguments:
        return given
    contents = (_null, _absent, _empty) if silent else (list,)
    fitted, text = given, None
    for content, as_text in itertools.product(contents, (False, True) if arguments else (False,)):
        tried = content(_as_text(given) if as_text else given)
        try:
            written = render(tried)
        except UserError:
            continue
        if not as_text and any(value and repr(dict(value)) in written for value in arguments):
            fitted, text = (tried, written) if text is None else (fitted, text)
            continue
        if as_text and not all(_json(value) in written for value in arguments):
            continue
        fitted, text = tried, written
        break
    if text is not None and any("content" in message and message["content"] is None for message in fitted):
        return next((content(fitted) for content in (_absent, _empty) if _prints_none(fitted, text, content, render)), fitted)
    return fitted


def _prints_none(messages: Sequence[Message], text: str, other: Callable, render: Render) -> bool:
    """Whether the template writes an absent content as the word None, and can write the `other` form of it."""
    said = [{**message, "content": SENTINEL} if message.get("content") is None else message for message in messages]
    try:
        render(other(messages))
        return render(said).replace(SENTINEL, "None") == text
    except UserError:
        return False


def without(messages: Sequence[Message], fields: Sequence[str], numbers: Sequence[int]) -> list[Message]:
    """The messages, those of `numbers` without these fields."""
    return [
        {name: value for name, value in message.items() if name not in fields} if number in numbers else message
        for number, message in enumerate(messages)
    ]


def _null(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "content": None} if message.get("content") is None else message for message in messages]


def _absent(messages: Sequence[Message]) -> list[Message]:
    return [{name: value for name, value in m.items() if name != "content" or value is not None} for m in messages]


def _empty(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "content": ""} if message.get("content") is None else message for message in messages]


def _json(value: dict[str, Any]) -> str:
    return value.text if isinstance(value, Arguments) else json.dumps(value, ensure_ascii=False)


def _arguments(message: Message) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [f["arguments"] for f in functions if isinstance(f, dict) and isinstance(f.get("arguments"), dict)]


def _as_text(messages: Sequence[Message]) -> list[Message]:
    def call_of(call: Any) -> Any:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
            return call
        function = {**function, "arguments": _json(function["arguments"])}
        return {**call, "function": function} if "function" in call else function

    return [
        {**message, "tool_calls": [call_of(call) for call in message["tool_calls"]]} if _arguments(message) else message
        for message in messages
    ]
