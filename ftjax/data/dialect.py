"""Variants that chat templates accept: absent or empty content, arguments as an object or as JSON text, a system message or
none.

Data comes in one of these forms and each template is written for one of them. ftjax tries the forms and gives the template
one that it can write.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from ftjax.data.example import Message
from ftjax.errors import UserError

SENTINEL = "qZ7answerQz9"  # occurs in no template, and no template changes it
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
Render = Callable[[Sequence[Message]], str]


class Arguments(dict):
    """Arguments of a tool call as an object; `text` is the original JSON text."""

    text: str = "{}"

    @classmethod
    def read(cls, given: Any) -> Any:
        """Parse arguments; none become an empty object, and anything that is not a JSON object stays as it is."""
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
    """Put the system message before the first user message, as Gemma 3's template does; return None if either is missing."""
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or messages[0]["role"] != "system" or not isinstance(messages[first].get("content"), str):
        return None
    asked = {**messages[first], "content": f"{messages[0].get('content') or ''}\n\n{messages[first]['content']}"}
    return [*messages[1:first], asked, *messages[first + 1 :]]


def fit_calls(messages: Sequence[Message], render: Render) -> list[Message]:
    """Return the messages with tool calls and absent contents in the form that the template writes.

    Absent content is null if the template asks for that; otherwise it is left out, or empty if the template fails at null
    or would write the word None. Arguments are objects, or JSON text if the template fails at objects or writes their
    Python form.
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
    """Return whether the template writes absent content as the word None and can write the `other` form."""
    said = [{**message, "content": SENTINEL} if message.get("content") is None else message for message in messages]
    try:
        render(other(messages))
        return render(said).replace(SENTINEL, "None") == text
    except UserError:
        return False


def without(messages: Sequence[Message], fields: Sequence[str], numbers: Sequence[int]) -> list[Message]:
    """Return the messages with `fields` removed from those in `numbers`."""
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
