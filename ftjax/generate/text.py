"""Decode tokens to text incrementally, and find stop strings."""

import re
from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"  # how tokenizers decode bytes of an incomplete character
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's byte fallback
CONTEXT = 16  # prompt tokens decoded together with the answer, so that spaces between words come out right


class TextStream:
    """Decodes an answer incrementally: never yields part of a character, and the total equals decoding all tokens at once."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        added = tokenizer.added_tokens_decoder.items() if skip_special_tokens else ()
        self._skipped = frozenset(index for index, token in added if token.special)
        self._tokens = list(prompt[-CONTEXT:])
        self._start, self._read = 0, len(self._tokens)  # start of the decoded window, and end of what was returned

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the new text; an incomplete character is held back until its last token."""
        self._tokens += tokens
        return self._advance(finish=False)

    def finish(self) -> str:
        """Return the text held back so far."""
        return self._advance(finish=True)

    def _advance(self, finish: bool) -> str:
        # Decode a run of byte pieces as a whole: one invalid byte also breaks the characters before it.
        # Skipped tokens do not end the run: decoding joins the bytes before and after them.
        last = next((token for token in reversed(self._tokens) if token not in self._skipped), None)
        if not finish and last is not None and BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(last) or ""):
            return ""
        before, now = self._decode(self._tokens[self._start : self._read]), self._decode(self._tokens[self._start :])
        if not now.startswith(before):  # the prompt ends within a character
            before = before.rstrip(BROKEN)
        if not finish and (now.endswith(BROKEN) or len(now) <= len(before)):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        # No clean-up of spaces: the text has to be exactly what the model generated.
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)


class StopStrings:
    """Texts that end an answer; they are not part of it."""

    def __init__(self, strings: Sequence[str] = ()):
        self.strings = tuple(dict.fromkeys(string for string in strings if string))

    def find(self, text: str, start: int = 0) -> int | None:
        """Return the index of the first stop string at `start` or later, or None."""
        found = [at for string in self.strings if (at := text.find(string, max(0, start))) >= 0]
        return min(found, default=None)

    @property
    def reach(self) -> int:
        """Number of characters before new text in which a stop string may begin."""
        return max(map(len, self.strings), default=1) - 1

    def open(self, text: str) -> int:
        """Return the number of characters at the end of `text` that may become a stop string and must be held back."""
        sizes = range(min(self.reach, len(text)), 0, -1)
        return next((n for n in sizes if any(string.startswith(text[-n:]) for string in self.strings)), 0)
