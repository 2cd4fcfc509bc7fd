"""Control tokens that a message only spells: `<|im_end|>` in a user's text must not end a turn.

Each text of a message, of its calls and of the tools is marked before the template sees it: `<|im_end|>` becomes
`<~|~i~m~...~>`, with a private-use character for `~`. Any control token that is still whole in the rendered text was then
written by the template. Each of these is replaced by an alias of the same length made of other private-use characters, and
the marks are removed. A copy of the tokenizer that knows the aliases and reads its control tokens as plain text tokenises the
result, and each alias becomes the token that it represents.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from ftjax.data.dialect import Arguments
from ftjax.data.example import Message
from ftjax.errors import UserError

MARK = "\U0010fffd"
MARKS = re.compile(rf"{MARK}|\\U0010fffd|\\udbff\\udffd", re.IGNORECASE)  # also as repr and JSON may write it
ALIAS = 0xF0000  # the first character used for aliases
PRIVATE = re.compile("[\U000f0000-\U000ffffd\U0010fffd]")
Mode = Literal["encode", "split", "error"]


@dataclass(frozen=True)
class Marked:
    """Messages and tools ready for the template, and what was found in them."""

    messages: list[Message]
    notes: Counter[str]
    tools: list[Any] | None = None

    @property
    def hidden(self) -> bool:
        return bool(self.notes["control tokens split"] or self.notes["control tokens split in answers"])


class Control:
    """The control tokens of a tokenizer.

    Args:
        frame: the text that the chat template writes around messages. An added token is a control token if it is special or
            occurs in `frame`. In an answer only tokens that are both count, and BOS and EOS: an answer may consist of the
            others.
    """

    def __init__(self, tokenizer: Any, frame: str):
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        tokens = {token.content: (number, token) for number, token in added.items() if len(token.content) > 1}
        self._tokens = {name: pair for name, pair in tokens.items() if pair[1].special or name in frame}
        edges = {tokenizer.bos_token, tokenizer.eos_token}
        turn = [name for name, (_, token) in self._tokens.items() if name in edges or (token.special and name in frame)]
        self.ids = {name: number for name, (number, _) in self._tokens.items()}
        self._any, self._turn = _pattern(self._tokens), _pattern(turn)
        self._tail = re.compile(rf"(?:(?:{self._turn.pattern})\s*)+\Z")
        self._alias = {name: chr(ALIAS + at) * len(name) for at, name in enumerate(self._tokens)}

    def mark(self, messages: Sequence[Message], mode: Mode, where: str, tools: list[Any] | None = None) -> Marked:
        """Return messages and tools with spelled control tokens broken up, unless `mode` is `encode`.

        Raises UserError if `mode` is `error`, and names the message.
        """
        notes: Counter[str] = Counter()
        marked = []
        for number, message in enumerate(messages):
            answer = message["role"] == "assistant"
            hide = partial(self._hidden, answer=answer, whose=f"message {number}", mode=mode, where=where, notes=notes)
            rest = {key: _changed(value, hide) for key, value in message.items() if key != "content"}
            content = message.get("content")
            if isinstance(content, str):
                end = self._tail.search(content) if answer else None  # an end that was written by hand stays an end
                body = content[: end.start()] if end else content
                content = hide(body) + content[len(body) :]
            marked.append({**message, **rest, **({"content": content} if "content" in message else {})})
        hide = partial(self._hidden, answer=False, whose="the list of tools", mode=mode, where=where, notes=notes)
        return Marked(marked, notes, _changed(tools, hide))

    def _hidden(self, text: str, *, answer: bool, whose: str, mode: Mode, where: str, notes: Counter[str]) -> str:
        """Return one text of a message with its control tokens broken up."""
        pattern = self._turn if answer else self._any
        found = pattern.search(text)
        if not found:
            return text
        if mode == "error":
            raise UserError(
                f"{where}: {whose} spells the control token {found[0]!r}; change the text, or set "
                "data.special_tokens_in_text (--special-tokens-in-text of generate and chat) to split, which reads it as plain "
                "text, or encode, as the token"
            )
        notes[f"control tokens {'encoded' if mode == 'encode' else 'split in answers' if answer else 'split'}"] = 1
        if mode == "encode":
            return text
        if PRIVATE.search(text) or MARKS.search(text):
            raise UserError(
                f"{where}: {whose} spells the control token {found[0]!r} and holds private-use characters that ftjax needs to "
                "tell it from a real one; take them out of the text"
            )
        return pattern.sub(lambda match: MARK.join(match[0]), text)

    def spelled(self, messages: Sequence[Message]) -> frozenset[int]:
        """Return the ids of control tokens that the assistant's messages spell."""
        texts = [message["content"] for message in messages if message["role"] == "assistant" and message.get("content")]
        return frozenset(self.ids[name] for text in texts for name in self._any.findall(text))

    def reveal(self, text: str, places: Sequence[int], where: str) -> tuple[str, list[int]]:
        """Return the rendered text with aliases and without marks, and `places` as offsets in that text."""
        if PRIVATE.search(MARKS.sub("", text)):
            raise UserError(f"{where}: it spells control tokens and holds private-use characters; take them out of the text")
        aliased = self._any.sub(lambda match: self._alias[match[0]], text)
        removed = [sum(len(mark) for mark in MARKS.findall(text, 0, place)) for place in places]
        return MARKS.sub("", aliased), [place - gone for place, gone in zip(places, removed, strict=True)]

    @cached_property
    def _reader(self) -> Tokenizer:
        made = json.loads(self._backend.to_str())
        made["truncation"] = made["padding"] = None
        for token in made["added_tokens"]:
            token["special"] = token["content"] in self._tokens
        reader = Tokenizer.from_str(json.dumps(made))
        self._real = {}
        for name, (number, token) in self._tokens.items():
            alias = self._alias[name]
            flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word")}
            reader.add_tokens([AddedToken(alias, normalized=False, special=False, **flags)])
            self._real[reader.token_to_id(alias)] = number
        reader.encode_special_tokens = True
        return reader

    def batch(self, texts: Sequence[str]) -> list[Any]:
        """Encode texts that contain aliases; `real` maps their ids to the tokenizer's."""
        return self._reader.encode_batch(list(texts), add_special_tokens=False)

    def real(self, ids: Sequence[int]) -> list[int]:
        return [self._real.get(number, number) for number in ids]


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to all texts of a value. Keys that are names stay: a template looks them up."""
    if isinstance(value, str):
        return value if value.isidentifier() else change(value)
    if isinstance(value, Mapping):
        made = {_changed(key, change): _changed(one, change) for key, one in value.items()}
        if isinstance(value, Arguments):
            text, made = value.text, Arguments(made)
            made.text = change(text)
        return made
    return [_changed(one, change) for one in value] if isinstance(value, list | tuple) else value


def _pattern(names: Any) -> re.Pattern:
    found = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)) if found else r"(?!)")
