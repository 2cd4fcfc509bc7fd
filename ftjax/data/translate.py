"""Translates messages of other tools into `role`, `content`, `tool_calls` and `train`.

ShareGPT's `{"from": "human", "value": "Hi"}` becomes `{"role": "user", "content": "Hi"}`; other role names and cases, flags
that say whether a turn is trained, and OpenAI's older `function_call` are translated too.
"""

import json
from collections.abc import Mapping
from typing import Any

from ftjax.data.example import Message
from ftjax.errors import UserError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "bard", "bing", "model", "ai", "llm"), "assistant"),
    "function_call": "assistant", "tool_call": "assistant",
    **dict.fromkeys(("tool", "observation", "ipython", "function", "function_response", "tool_response"), "tool"),
}  # fmt: skip
KNOWN = frozenset(ROLES.values())
OWN = frozenset({"ipython", "observation"})  # some templates know these names, so `role` keeps them
TRAINED = ("training", "trainable", "train_turn", "loss")  # other names of `train`
CALLS = ("function_call", "tool_call")


def translated(message: Mapping[str, Any], place: str) -> Message:
    """Translate one message.

    An unknown `role` stays as it is: templates may have roles of their own.

    Raises UserError for an unknown `from`, and for a flag or call that cannot be read.
    """
    turn = dict(message)
    own = "role" in turn or "from" not in turn
    speaker = turn.get("role") if own else turn.pop("from")
    said = speaker.strip().lower() if isinstance(speaker, str) else None
    if not own and said not in ROLES:
        raise UserError(f"{place}: expected from to be one of {', '.join(ROLES)}; found {speaker!r:.60}")
    if said in ROLES and not (own and said in OWN):
        turn["role"] = ROLES[said]
    if turn.get("content") is None and turn.get("value") is not None:
        turn["content"] = turn["value"]
    if not own or "content" in turn:
        turn["content"] = turn.get("content")
        turn.pop("value", None)
    if said in CALLS:
        _take_calls(turn)
    _take_function_call(turn, place)
    _take_flags(turn, place)
    return turn


def _take_calls(turn: Message) -> None:
    """Read ShareGPT's `{"from": "function_call", "value": "{...}"}`; anything that is not a call stays text."""
    try:
        calls = json.loads(turn["content"])
    except (TypeError, ValueError, RecursionError):
        return
    calls = calls if isinstance(calls, list) else [calls]
    if calls and all(isinstance(call, dict) and "name" in call for call in calls):
        turn |= {"content": None, "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _take_function_call(turn: Message, place: str) -> None:
    calls = turn.get("tool_calls")
    if isinstance(calls, str):  # CSV and Parquet hold lists as JSON text
        turn["tool_calls"] = _parsed(calls, "tool_calls", place) if calls.strip() else None
    call = turn.pop("function_call", None)
    if isinstance(call, str):
        call = _parsed(call, "function_call", place) if call.strip() else None
    if not call:
        return
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise UserError(f"{place}: function_call is {call!r:.60}, expected an object with name and arguments")
    if turn.get("tool_calls"):
        raise UserError(f"{place}: function_call and tool_calls are both given; keep one of them")
    turn["tool_calls"] = [{"type": "function", "function": dict(call)}]


def _take_flags(turn: Message, place: str) -> None:
    flags: dict[str, Any] = {}
    for name in ("train", *TRAINED):
        value = turn.pop(name, None)
        if value is None:
            continue
        if value not in (0, 1):
            raise UserError(f"{place}: {name} is {value!r:.60}, expected true or false")
        flags[name] = bool(value)
    if len(set(flags.values())) > 1:
        raise UserError(f"{place}: {' and '.join(flags)} contradict each other; keep one of them")
    if flags:
        turn["train"] = next(iter(flags.values()))


def _parsed(text: str, name: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{place}: {name} is {text!r:.60}, which is not JSON") from None
