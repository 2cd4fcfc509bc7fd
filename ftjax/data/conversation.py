"""Checks lists of messages and reads the shapes in which other tools write them."""

import json
from collections.abc import Mapping
from typing import Any

from ftjax.data.dialect import CALLS, REASONING, Arguments
from ftjax.data.example import Message
from ftjax.data.translate import translated
from ftjax.data.values import check_unicode
from ftjax.errors import UserError


def check_messages(messages: Any, where: str) -> tuple[Message, ...]:
    """Check messages for role and text, and drop keys that are null; content may be null beside a call or reasoning.

    Content that is given as parts, `[{"type": "text", "text": ...}]`, is joined.

    Raises UserError for anything else.
    """
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else f"{messages!r:.80}"
        raise UserError(f"{where}: expected a list of messages with role and content; found {found}")
    return tuple(_check(message, number, where) for number, message in enumerate(messages))


def _check(message: Any, number: int, where: str) -> Message:
    place = f"{where}: message {number}"
    if not isinstance(message, Mapping):
        raise UserError(f"{place}: expected an object with role and content; found {message!r:.80}")
    message = translated(message, place)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(f"{place}: expected a role (system, user, assistant or tool); found {_shown(message)}")
    kept = {name: value for name, value in message.items() if value is not None and name != "content"}
    if isinstance(content, list):
        content = _parts(content, place)
    silent = content is None and role == "assistant" and any(kept.get(name) for name in (*CALLS, *REASONING))
    if content is None and not silent:
        raise UserError(f"{place}: expected content; found {_shown(message)}")
    if not silent and not isinstance(content, str):
        raise UserError(f"{place}: the content is {type(content).__name__}, not text: {content!r:.60}")
    train, weight = kept.get("train"), kept.get("weight")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6):
        raise UserError(f"{place}: weight is {weight!r}, expected a number from 0 on")
    if role != "assistant" and (train or weight):
        raise UserError(
            f"{place}: of role {role} is to be trained, but only the assistant's are; write data.train_on_inputs: true"
        )
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_tool_call(call, place) for call in kept["tool_calls"]]
    checked = {**kept, "role": role, "content": content}
    check_unicode(checked, "the message", place)
    return checked


def _tool_call(call: Any, place: str) -> Any:
    """Parse arguments that are JSON text into the object that most templates expect, and drop keys that are null."""
    if not isinstance(call, Mapping):
        raise UserError(f"{place}: a tool call is {call!r:.60}, expected an object")
    call = {name: value for name, value in call.items() if value is not None}
    function = call.get("function", call)
    if not isinstance(function, Mapping) or "name" not in function:
        return call
    function = {**function, "arguments": Arguments.read(function.get("arguments"))}
    return {**call, "function": function} if "function" in call else function


def _parts(parts: list[Any], place: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or (isinstance(part, Mapping) and part.get("type", "text") != "text"):
            what = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"{place}: a part of the content is {what!r}; only text can be trained")
        texts.append(text)
    return "".join(texts)


def read_json_column(text: str, name: str, where: str) -> Any:
    """Parse a list that CSV or Parquet holds as JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {name!r} is not JSON: {str(error).partition(';')[0]:.120}") from None


def _shown(value: Any) -> str:
    return f"keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"{value!r:.80}"
