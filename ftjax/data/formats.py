"""What the columns of a row mean.

A row becomes one of three things: plain text, a prompt with its completion, or a conversation. As an example,
`{"instruction": "Add.", "input": "2 3", "output": "5"}` becomes `Example(prompt="Add.\\n\\n2 3", completion="5")`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftjax.data.read import Row
from ftjax.errors import UserError

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """Exactly one of `text`, `messages`, or `prompt` with `completion` is set."""

    where: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] | None = None


def _text(v: Mapping[str, Any], where: str) -> Example:
    return Example(where, text=_string(v, "text", where))


def _prompt_completion(v: Mapping[str, Any], where: str) -> Example:
    if isinstance(v["prompt"], list):
        answer = v["completion"]
        answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": _string(v, "completion", where)}]
        return Example(where, messages=_check([*v["prompt"], *answer], where))
    return Example(where, prompt=_string(v, "prompt", where), completion=_filled(v, "completion", where))


def _messages(v: Mapping[str, Any], where: str) -> Example:
    return Example(where, messages=_check(v["messages"], where))


def _conversations(v: Mapping[str, Any], where: str) -> Example:
    """ShareGPT: `{"from": "human", "value": ...}`."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}
    messages = []
    for turn in v["conversations"] or []:
        if not isinstance(turn, Mapping) or turn.get("from") not in roles:
            raise UserError(f"{where}: expected turns with from ({', '.join(roles)}) and value; found {turn!r:.80}")
        messages.append({"role": roles[turn["from"]], "content": turn.get("value")})
    return Example(where, messages=_check(messages, where))


def _instruction(v: Mapping[str, Any], where: str) -> Example:
    extra = v.get("input")
    prompt = _string(v, "instruction", where) + (f"\n\n{extra}" if extra else "")
    return Example(where, prompt=prompt, completion=_filled(v, "output", where))


def _question(v: Mapping[str, Any], where: str) -> Example:
    return Example(where, prompt=_string(v, "question", where), completion=_filled(v, "answer", where))


def _document(v: Mapping[str, Any], where: str) -> Example:
    return Example(where, prompt=_string(v, "document", where), completion=_filled(v, "summary", where))


def _label(v: Mapping[str, Any], where: str) -> Example:
    return Example(where, prompt=_string(v, "text", where), completion=_filled(v, "label", where))


# name -> (columns that tell it, how it is read); the first whose columns are all there is taken.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], Example]]] = {
    "messages": (("messages",), _messages),
    "conversations": (("conversations",), _conversations),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "instruction": (("instruction", "output"), _instruction),
    "question_answer": (("question", "answer"), _question),
    "document_summary": (("document", "summary"), _document),
    "text_label": (("text", "label"), _label),
    "text": (("text",), _text),
}


def to_examples(rows: list[Row], name: str, columns: Mapping[str, str]) -> list[Example]:
    """Read every row in the format `name`, or in the one that the first row's columns tell (`auto`).

    Args:
        columns: ftjax's column name -> the file's.

    Raises UserError, with file and line, where a column is missing or holds something else.
    """
    first = _rename(rows[0], columns)
    if name == "auto":
        name = next((n for n, (needs, _) in FORMATS.items() if set(needs) <= set(first)), "")
        if not name:
            known = " or ".join(" and ".join(f'"{c}"' for c in needs) for needs, _ in FORMATS.values())
            raise UserError(
                f"{rows[0].where}: expected {known}; found {', '.join(map(repr, rows[0].values))}. Map them with data.columns, "
                "such as data.columns: {prompt: question, completion: answer}"
            )
    if name not in FORMATS:
        raise UserError(f"data.format: {name!r} is not known; choose one of auto, {', '.join(FORMATS)}")
    needs, read = FORMATS[name]
    examples = []
    for row in rows:
        values = _rename(row, columns)
        missing = [c for c in needs if c not in values]
        if missing:
            raise UserError(f"{row.where}: expected {', '.join(map(repr, needs))}; found {', '.join(map(repr, row.values))}")
        examples.append(read(values, row.where))
    return examples


def _rename(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    absent = [theirs for theirs in columns.values() if theirs not in row.values]
    if absent:
        raise UserError(
            f"{row.where}: data.columns names {', '.join(map(repr, absent))}, but the row has {', '.join(map(repr, row.values))}"
        )
    taken = set(columns.values())
    return {k: v for k, v in row.values.items() if k not in taken} | {ours: row.values[c] for ours, c in columns.items()}


def _string(v: Mapping[str, Any], name: str, where: str) -> str:
    value = v[name]
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} holds {type(value).__name__}, expected text")
    return value


def _filled(v: Mapping[str, Any], name: str, where: str) -> str:
    value = _string(v, name, where)
    if not value.strip():
        raise UserError(f"{where}: {name!r} is empty, so there is nothing to learn from this row; fill or remove it")
    return value


def _check(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: expected a list of messages with role and content; found {messages!r:.80}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(f"{where}: expected a message with role and content; found {message!r:.80}")
        if not isinstance(message["content"], str) and not message.get("tool_calls"):
            raise UserError(f"{where}: the content of a {message['role']} message is {type(message['content']).__name__}, not text")
    return tuple(dict(message) for message in messages)
