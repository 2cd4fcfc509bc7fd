"""The bytes of text that each token of a tokenizer stands for, by which texts of two tokenizers are compared.

In byte-level BPE, `Ġfour` stands for the bytes of ` four`; in SentencePiece `▁four` does, and `<0x0A>` for one byte. A special
token stands for none.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftjax.errors import UserError

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback
SPACE = "\u2581"  # SentencePiece's space


class TokenBytes:
    """The bytes of the tokens of a tokenizer, whose ids are the indices of `of`.

    Attributes:
        of: bytes by id; empty for a special token.
        special: ids of special tokens.
        ends: those that can end a text.
        eos: the id that ends a text, or None.
    """

    def __init__(self, tokenizer: Any, name: str):
        """Args: name: of the model, for messages. Raises UserError if bytes do not follow from single tokens."""
        steps = list(_steps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")))
        kinds = {step["type"] for step in steps}
        spaces = "Metaspace" in kinds or any(_is_space(step) for step in steps)
        if "ByteLevel" in kinds:
            read = _byte_level
        elif spaces or kinds == {"Fuse"}:
            read = _sentencepiece if spaces else lambda piece: piece.encode()
        else:
            raise UserError(
                f"{name}: texts of its tokenizer cannot be aligned with another's: its decoder "
                f"({', '.join(sorted(kinds)) or 'none'}) makes a token's text depend on its neighbours, or drops spaces. "
                "Byte-level BPE and SentencePiece can be aligned; choose a model with such a tokenizer"
            )
        vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}
        self.eos: int | None = tokenizer.eos_token_id
        self.ends = self.special - ({tokenizer.bos_token_id, tokenizer.unk_token_id} - {self.eos})
        self.of = [b""] * (1 + max(vocabulary.values()))
        self.names: Mapping[int, str] = {number: piece for piece, number in vocabulary.items()}
        for number, piece in self.names.items():
            if number not in self.special:
                self.of[number] = added[number].content.encode() if number in added else read(piece)

    def matches(self, other: "TokenBytes") -> list[tuple[int, int]]:
        """Return the ids of tokens that both have, `(own, other's)`, by rising ids of the other: ordinary tokens of the same
        bytes, special tokens of the same name, and the tokens that end a text."""
        own = self._by_text()
        found = {theirs: own[text] for text, theirs in other._by_text().items() if text in own}
        if self.eos is not None and other.eos is not None and self.eos not in found.values() and other.eos not in found:
            found[other.eos] = self.eos
        return sorted((mine, theirs) for theirs, mine in found.items())

    def _by_text(self) -> dict[bytes | str, int]:
        """Return ids by bytes, or by name for special tokens. Of several tokens with the same bytes the first that is not of
        SentencePiece's byte fallback counts."""
        found: dict[bytes | str, int] = {}
        for number in sorted(self.names, key=lambda number: (bool(BYTE.fullmatch(self.names[number])), number)):
            found.setdefault(self.names[number] if number in self.special else self.of[number], number)
        found.pop(b"", None)
        return found

    def plain(self, token: int) -> bool:
        """Return whether a token stands for text: it is no special one, and none that pads the model's vocabulary."""
        return token < len(self.of) and token not in self.special

    def text(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes of those of these tokens that stand for text."""
        return b"".join(self.of[token] for token in tokens if self.plain(token))


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the steps of a decoder of a tokenizer.json."""
    if decoder is not None and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder is not None:
        yield decoder


def _is_space(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step.get("pattern") == {"String": SPACE} and step.get("content") == " "


def _byte_level(piece: str) -> bytes:
    return bytes(_BYTES[character] for character in piece) if all(c in _BYTES for c in piece) else piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if found := BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace(SPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE: printable ones stand for themselves, others follow from 256 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_characters()
