"""Converts a SentencePiece BPE vocabulary (Llama 2 style) to a `tokenizers` tokenizer with the same ids.

SentencePiece merges the neighbouring symbols whose joined piece has the best score; a `tokenizers` BPE follows a list of
pairs. So each piece becomes all pairs that form it, best score first (Kudo & Richardson 2018, arXiv:1808.06226; the
inference rule is `bpe_model.cc` of github.com/google/sentencepiece). Text is prepared as in the `tokenizer.json` of Llama
2: a space before each stretch of text, every space as U+2581, byte tokens for unknown characters.
"""

from collections.abc import Sequence
from enum import IntEnum

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

SPACE = "\u2581"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


class Kind(IntEnum):
    """Type of a piece: values of SentencePiece's `ModelProto` and of GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def build(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    add_space_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
    charsmap: bytes = b"",
) -> Tokenizer:
    """Build the tokenizer, without a post-processor.

    Args:
        pieces: the vocabulary, by id; no piece occurs twice.
        scores: one float for each piece; larger is merged earlier.
        kinds: a `Kind` for each piece.
        add_space_prefix: SentencePiece's `add_dummy_prefix`.
        remove_extra_whitespaces: SentencePiece's setting of that name: no space at either end, one between words.
        charsmap: SentencePiece's compiled normalisation rules; empty for none.
    """
    vocab = {piece: index for index, piece in enumerate(pieces)}
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == Kind.UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(
            vocab,
            merges(pieces, scores, kinds),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=all(byte in vocab for byte in BYTES),
        )
    )
    prepare: list[normalizers.Normalizer] = []
    if charsmap:
        prepare += [normalizers.Precompiled(charsmap)]
    if remove_extra_whitespaces:
        prepare += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z| +(?= )"), "")]
    if add_space_prefix:
        prepare += [normalizers.Prepend(SPACE)]
    tokenizer.normalizer = normalizers.Sequence([*prepare, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    add_special_pieces(tokenizer, pieces, kinds)
    return tokenizer


def merges(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that join to a piece, in merge order."""
    ids = {
        piece: index
        for index, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in (Kind.NORMAL, Kind.UNUSED)
    }
    found = []
    for piece, index in ids.items():
        for split in range(1, len(piece)):
            left, right = piece[:split], piece[split:]
            if left in ids and right in ids:
                # Pairs of one piece are ordered by id, as in the published tokenizer.json files; they never compete.
                found.append((-scores[index], index, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def add_special_pieces(tokenizer: Tokenizer, pieces: Sequence[str], kinds: Sequence[int]) -> None:
    """Keep control tokens (special), the unknown token (special) and user-defined ones (not special) whole in any text."""
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind in (Kind.CONTROL, Kind.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True)])
        elif kind == Kind.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False)])


def template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> processors.TemplateProcessing:
    """Return a post-processor that puts `bos` before and `eos` after each text, if given."""
    single = [token for token in (bos, "$A", eos) if token]
    pair = [token for token in (bos, "$B:0", eos) if token]
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    return processors.TemplateProcessing(single=" ".join(single), pair=" ".join([*single, *pair]), special_tokens=ids)
