"""A tokenizer as the data code needs it: encodes batches with character offsets and knows its special tokens.

It uses the Rust tokenizer directly, as transformers does, so that all cores tokenise a batch and only what is needed
becomes Python objects.
"""

from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from ftjax.errors import UserError

ANCHORS = ("\n", ".", "a", "0", ")")  # prefixes for tokenising a text as a continuation


class Tokens:
    """Wraps a tokenizer; `bos` is the id that it puts before every text, or None."""

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
        # Tokens that can end a turn unless the text spelled them. A BOS only begins one.
        self.ends = self.special - ({tokenizer.bos_token_id} - {self.eos})
        # A tokenizer that knows every character often reuses another special token as its unknown token.
        unknown = tokenizer.unk_token_id
        self.unknown: int | None = None if unknown in (self.eos, tokenizer.bos_token_id, tokenizer.pad_token_id) else unknown
        self.size = len(tokenizer)
        self.opens_with_space = self._ids("\na") != self._ids("\n") + self._ids("a")

    def batch(self, texts: Sequence[str]) -> list[Any]:
        """Return one `tokenizers.Encoding` per text, without the special tokens that the tokenizer adds."""
        # transformers sets these before each call, and a tokenizer.json may specify truncation.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = False
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    def _ids(self, text: str) -> list[int]:
        return self.batch([text])[0].ids

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text with the tokenizer's prefix, and never two BOS."""
        return self.with_prefix(self._ids(text))

    def with_prefix(self, ids: list[int]) -> list[int]:
        if self.bos is not None and ids[:1] == [self.bos]:
            ids = ids[1:]
        return [*self.prefix, *ids]

    def continuation(self, text: str, batch: Callable[[Sequence[str]], list[Any]] | None = None) -> tuple[Any, int, int]:
        """Encode a text that continues another one: without the space that some tokenizers put before a text.

        Returns its encoding (by `batch`, or else by this tokenizer), and the numbers of tokens and characters in it before
        the text itself.
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
        """Return a digest of everything that determines the ids of a text."""
        tokenizer = self.tokenizer
        self.batch([])  # resets truncation that another call may have set
        facts = (tokenizer.chat_template, tokenizer.special_tokens_map, self.prefix, sorted(self.special))
        digest = xxhash.xxh3_128(self.backend.to_str().encode())
        digest.update(repr(facts).encode())
        return digest.hexdigest()


def first_token(encoding: Any, start: int, stop: int) -> tuple[int, bool]:
    """Return the first token with a character of `[start, stop)`, and whether it also has an earlier one.

    Return the number of tokens if there is none.
    """
    for position in range(start, stop):  # characters that a normaliser removes are in no token
        token = encoding.char_to_token(position)
        if token is not None:
            return token, encoding.token_to_chars(token)[0] < start
    return len(encoding.ids), False


def end_token(encoding: Any, stop: int, length: int) -> int:
    """Return one past the last token with a character before `stop`."""
    token, shared = first_token(encoding, stop, length)
    return token + 1 if shared else token


def _find(ids: list[int], part: list[int]) -> int:
    """Return the index at which `part` begins in `ids`, or 0."""
    for start in range(len(ids) - len(part) + 1):
        if ids[start : start + len(part)] == part:
            return start
    return 0
