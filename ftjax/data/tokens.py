"""A tokenizer, seen as the data room needs it: batches of text into ids and places, and which special tokens it adds.

It works on the Rust tokenizer inside, as transformers' own call does, so that a batch is tokenised on all cores and only
what is asked for becomes Python objects.
"""

from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from ftjax.errors import UserError

ANCHORS = ("\n", ".", "a", "0", ")")  # what a text is put behind, to be tokenised as one that goes on


class Tokens:
    """`bos` is the id that the tokenizer puts before every text, or None where it does not."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        if self.backend is None or not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer ({type(tokenizer).__name__}) is a slow one, which cannot tell where its tokens begin; "
                "set model.tokenizer to one with a tokenizer.json"
            )
        self.eos: int | None = tokenizer.eos_token_id
        probe, plain = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
        self.prefix: list[int] = probe[: _find(probe, plain)]
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id in self.prefix else None
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}
        # What can end a turn, where the text did not spell it. A BOS only begins one.
        self.ends = self.special - ({tokenizer.bos_token_id} - {self.eos})
        # Of a tokenizer that knows every character the unknown one is often another special token.
        unknown = tokenizer.unk_token_id
        self.unknown: int | None = None if unknown in (self.eos, tokenizer.bos_token_id, tokenizer.pad_token_id) else unknown
        self.size = len(tokenizer)
        self.opens_with_space = self._ids("\na") != self._ids("\n") + self._ids("a")

    def batch(self, texts: Sequence[str]) -> list[Any]:
        """One `tokenizers.Encoding` for each text, without the special tokens that the tokenizer adds."""
        # transformers sets these before each of its calls, and a tokenizer.json may carry a truncation of its own.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = False
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    def _ids(self, text: str) -> list[int]:
        return self.batch([text])[0].ids

    def text_ids(self, text: str) -> list[int]:
        """With what the tokenizer puts before a text, and never two BOS."""
        return self.with_prefix(self._ids(text))

    def with_prefix(self, ids: list[int]) -> list[int]:
        if self.bos is not None and ids[:1] == [self.bos]:
            ids = ids[1:]
        return [*self.prefix, *ids]

    def continuation(self, text: str, batch: Callable[[Sequence[str]], list[Any]] | None = None) -> tuple[Any, int, int]:
        """A text that goes on after another one: without the space that some tokenizers put before a text.

        Gives its encoding (by `batch`, where it is not this tokenizer's), and how many tokens and characters of that stand
        before the text itself.
        """
        batch = batch or self.batch
        for anchor in ANCHORS if self.opens_with_space else ():
            encoding = batch([anchor + text])[0]
            alone = self._ids(anchor)
            if encoding.ids[: len(alone)] == alone and first_token(encoding, len(anchor), len(anchor + text)) == (
                len(alone),
                False,
            ):
                return encoding, len(alone), len(anchor)
        return batch([text])[0], 0, 0

    def fingerprint(self) -> str:
        """A digest of everything that decides which ids a text becomes."""
        tokenizer = self.tokenizer
        self.batch([])  # without the truncation that some other call may have set
        facts = (tokenizer.chat_template, tokenizer.special_tokens_map, self.prefix, sorted(self.special))
        digest = xxhash.xxh3_128(self.backend.to_str().encode())
        digest.update(repr(facts).encode())
        return digest.hexdigest()


def first_token(encoding: Any, start: int, stop: int) -> tuple[int, bool]:
    """The first token that holds a character of `[start, stop)`, and whether it also holds one before.

    Where no token does, the number of tokens.
    """
    for position in range(start, stop):  # characters that a normaliser removes belong to no token
        token = encoding.char_to_token(position)
        if token is not None:
            return token, encoding.token_to_chars(token)[0] < start
    return len(encoding.ids), False


def end_token(encoding: Any, stop: int, length: int) -> int:
    """One past the last token that holds a character before `stop`."""
    token, shared = first_token(encoding, stop, length)
    return token + 1 if shared else token


def _find(ids: list[int], part: list[int]) -> int:
    """Where `part` begins in `ids`."""
    for start in range(len(ids) - len(part) + 1):
        if ids[start : start + len(part)] == part:
            return start
    return 0
