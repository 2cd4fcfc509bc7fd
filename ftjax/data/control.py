"""Control tokens that a message only spells: `<|im_end|>` in a user's text must not end a turn.

Each message is marked before the template sees it: `<|im_end|>` becomes `<~|~i~m~...~>`, with a private-use character for
`~`. Any control token that is still whole in the rendered text was then written by the template. Each of these is replaced
by an alias of the same length made of other private-use characters, and the marks are removed. A copy of the tokenizer that
knows the aliases and reads its control tokens as plain text tokenises the result, and each alias becomes the token that it
represents.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from ftjax.data.example import Message
from ftjax.errors import UserError

MARK = "\U0010fffd"
ALIAS = 0xF0000  # the first character used for aliases
PRIVATE = re.compile("[\U000f0000-\U000ffffd\U0010fffd]")
Mode = Literal["encode", "split", "error"]


@dataclass(frozen=True)
class Marked:
    """Messages ready for the template, and what was found in them."""

    messages: list[Message]
    notes: Counter[str]

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

    def mark(self, messages: Sequence[Message], mode: Mode, where: str) -> Marked:
        """Return the messages with spelled control tokens broken up, unless `mode` is `encode`.

        Raises UserError if `mode` is `error`, and names the message.
        """
        marked, notes = [], Counter()
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, str) and content:
                answer = message["role"] == "assistant"
                end = self._tail.search(content) if answer else None  # an end that was written by hand stays an end
                body = content[: end.start()] if end else content
                found = (self._turn if answer else self._any).search(body)
                if found:
                    self._found(found[0], number, message["role"], mode, where)
                    kind = "encoded" if mode == "encode" else "split in answers" if answer else "split"
                    notes[f"control tokens {kind}"] = 1
                    if mode != "encode":
                        if PRIVATE.search(content):
                            raise UserError(
                                f"{where}: message {number} spells the control token {found[0]!r} and holds private-use "
                                "characters that ftjax needs to tell it from a real one; take them out of the text"
                            )
                        pattern = self._turn if answer else self._any
                        hidden = pattern.sub(lambda match: MARK.join(match[0]), body)
                        message = {**message, "content": hidden + content[len(body) :]}
            marked.append(message)
        return Marked(marked, notes)

    def _found(self, name: str, number: int, role: str, mode: Mode, where: str) -> None:
        if mode == "error":
            raise UserError(
                f"{where}: message {number} of the {role} spells the control token {name!r}; change the text, or set "
                "data.special_tokens_in_text (--special-tokens-in-text of generate and chat) to split, which reads it as plain "
                "text, or encode, as the token"
            )

    def spelled(self, messages: Sequence[Message]) -> frozenset[int]:
        """Return the ids of control tokens that the assistant's messages spell."""
        texts = [message["content"] for message in messages if message["role"] == "assistant" and message.get("content")]
        return frozenset(self.ids[name] for text in texts for name in self._any.findall(text))

    def reveal(self, text: str, places: Sequence[int], where: str) -> tuple[str, list[int]]:
        """Return the rendered text with aliases and without marks, and `places` as offsets in that text."""
        if PRIVATE.search(text.replace(MARK, "")):
            raise UserError(f"{where}: it spells control tokens and holds private-use characters; take them out of the text")
        aliased = self._any.sub(lambda match: self._alias[match[0]], text)
        return aliased.replace(MARK, ""), [place - text.count(MARK, 0, place) for place in places]

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


def _pattern(names: Any) -> re.Pattern:
    found = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)) if found else r"(?!)")
