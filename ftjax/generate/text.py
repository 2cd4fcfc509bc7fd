"""From tokens to text as it grows, and where a text has to stop."""

import re
from collections.abc import Sequence
from typing import Any

from ftjax.data.template import Template
from ftjax.errors import UserError

BROKEN = "\N{REPLACEMENT CHARACTER}"  # how tokenizers show bytes that are not yet a character
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a character that SentencePiece has no piece for
CONTEXT = 16  # tokens of the prompt that are decoded along, so that spaces come out as they stand between words


class TextStream:
    """The text of an answer, piece by piece: never a part of a character, and in the end the same as decoded at once."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._tokens = list(prompt[-CONTEXT:])
        self._start, self._read = 0, len(self._tokens)  # where the decoded window begins, and how far it was given out

    def feed(self, tokens: Sequence[int]) -> str:
        """The new text; part of a character comes with the token that completes it."""
        self._tokens += tokens
        return self._advance(finish=False)

    def finish(self) -> str:
        """What was held back."""
        return self._advance(finish=True)

    def _advance(self, finish: bool) -> str:
        # A run of byte pieces is decoded as a whole: one wrong byte breaks the characters before it, too.
        if not finish and self._tokens and BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(self._tokens[-1]) or ""):
            return ""
        before, now = self._decode(self._tokens[self._start : self._read]), self._decode(self._tokens[self._start :])
        if not now.startswith(before):  # the prompt ends within a character
            before = before.rstrip(BROKEN)
        if not finish and (now.endswith(BROKEN) or len(now) <= len(before)):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        # Nothing is cleaned up: the text is what the model wrote.
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)


class StopStrings:
    """Texts that end an answer; they are not part of it."""

    def __init__(self, strings: Sequence[str] = ()):
        self.strings = tuple(dict.fromkeys(string for string in strings if string))

    def find(self, text: str, start: int = 0) -> int | None:
        """Where the first of them begins, at `start` or later."""
        found = [at for string in self.strings if (at := text.find(string, max(0, start))) >= 0]
        return min(found, default=None)

    @property
    def reach(self) -> int:
        """Characters before new text from which a stop string may begin."""
        return max(map(len, self.strings), default=1) - 1

    def open(self, text: str) -> int:
        """Characters at the end of `text` that may yet become a stop string, so that they should not be shown."""
        sizes = range(min(self.reach, len(text)), 0, -1)
        return next((n for n in sizes if any(string.startswith(text[-n:]) for string in self.strings)), 0)


def turn_end(tokenizer: Any) -> int | None:
    """The special token with which the chat template closes an answer (`<end_of_turn>`), which need not be the EOS."""
    try:
        return Template(tokenizer).closers[0]
    except UserError:  # several templates and no default
        return None
