"""Lists of messages: checked, and read from the shapes that other tools write them in."""

import json
from collections.abc import Mapping
from typing import Any

from ftjax.data.example import Message
from ftjax.errors import UserError

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip


def check_messages(messages: Any, where: str) -> tuple[Message, ...]:
    """Messages with a role and text, without keys that are null.

    Content given as parts, `[{"type": "text", "text": ...}]`, is put together.

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
    if "role" not in message and "from" in message:
        message = _turn(message, place)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(f"{place}: expected a role (system, user, assistant or tool); found {_shown(message)}")
    kept = {name: value for name, value in message.items() if value is not None and name != "content"}
    if isinstance(content, list):
        content = _parts(content, place)
    if content is None:
        if role == "assistant" and any(kept.get(name) for name in ("tool_calls", "reasoning_content", "thinking")):
            content = ""
        else:
            raise UserError(f"{place}: expected content; found {_shown(message)}")
    if not isinstance(content, str):
        raise UserError(f"{place}: the content is {type(content).__name__}, not text: {content!r:.60}")
    train, weight = kept.get("train"), kept.get("weight")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{place}: train is {train!r}, expected true or false")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6):
        raise UserError(f"{place}: weight is {weight!r}, expected a number from 0 on")
    if role != "assistant" and (train or weight):
        raise UserError(
            f"{place}: of role {role} is to be trained, but only the assistant's are; write data.train_on_inputs: true"
        )
    for text in (role, content):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{place}: holds half of a character, {text[error.start]!r}; write the text as UTF-8") from None
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_tool_call(call, place) for call in kept["tool_calls"]]
    return {**kept, "role": role, "content": content}


def _tool_call(call: Any, place: str) -> Any:
    """Arguments that are JSON text become the object that templates expect, and keys that are null go."""
    if not isinstance(call, Mapping):
        raise UserError(f"{place}: a tool call is {call!r:.60}, expected an object")
    call = {name: value for name, value in call.items() if value is not None}
    function = call.get("function", call)
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            function = {**function, "arguments": json.loads(function["arguments"])}
        except (ValueError, RecursionError):
            return call
        return {**call, "function": function} if "function" in call else function
    return call


def _parts(parts: list[Any], place: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or (isinstance(part, Mapping) and part.get("type", "text") != "text"):
            what = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"{place}: a part of the content is {what!r}; only text can be trained")
        texts.append(text)
    return "".join(texts)


def from_sharegpt(turns: Any, where: str) -> list[Any]:
    """`{"from": "human", "value": "Hi"}` as `{"role": "user", "content": "Hi"}`."""
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else f"{turns!r:.80}"
        raise UserError(f"{where}: expected a list of turns with from and value; found {found}")
    return [_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(turns)]


def _turn(turn: Any, place: str) -> Any:
    if isinstance(turn, Mapping) and "from" not in turn and "role" in turn:
        return turn
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise UserError(f"{place}: expected from ({', '.join(SHAREGPT_ROLES)}) and value; found {_shown(turn)}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    message = {**rest, "role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}
    if speaker == "function_call" and isinstance(turn.get("value"), str):
        try:
            call = json.loads(turn["value"])
        except (ValueError, RecursionError):
            return message
        if isinstance(call, Mapping) and "name" in call:
            return {**message, "content": "", "tool_calls": [{"type": "function", "function": dict(call)}]}
    return message


def read_json_column(text: str, name: str, where: str) -> Any:
    """CSV and Parquet hold lists as JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {name!r} is not JSON: {str(error).partition(';')[0]:.120}") from None


def _shown(value: Any) -> str:
    return f"keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"{value!r:.80}"
