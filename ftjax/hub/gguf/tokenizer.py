"""Rebuilds the tokenizer and chat template of a GGUF file with the `tokenizers` library.

Two kinds: `gpt2`, a byte-level BPE with its merges (Llama 3, SmolLM2), and `llama`, a SentencePiece BPE with scores
(Llama 2, Mistral, TinyLlama).
"""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ftjax.errors import UserError
from ftjax.hub.gguf.file import open_gguf
from ftjax.hub.gguf.pretokenizer import SPLITTINGS
from ftjax.hub.tokenizer import sentencepiece_bpe
from ftjax.hub.tokenizer.sentencepiece_bpe import Kind, add_special_pieces, template

PREFIX = "tokenizer.ggml."
INSTEAD = "give the original tokenizer as model.tokenizer (its folder or Hub id)"
SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# llama.cpp's converter fills unused ids, up to the rows of the embedding, with these.
FILLER = re.compile(r"\[PAD\d+\]")


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file; `save_pretrained` writes files with which AutoTokenizer behaves the same.

    Raises UserError for an unknown tokenizer kind or pre-tokenisation, and for damaged lists.
    """
    metadata = open_gguf(path).metadata
    values = {key[len(PREFIX) :]: value for key, value in metadata.items() if key.startswith(PREFIX)}
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return build_tokenizer(path, values, **{
        **({"model_max_length": context} if context else {}),
        **({"chat_template": templates} if (templates := _chat_templates(metadata)) else {}),
    })  # fmt: skip


def build_tokenizer(path: Path, values: dict[str, Any], **more: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a file describes.

    Args:
        path: for messages.
        values: the keys under `tokenizer.ggml.`, without that prefix.
        more: further attributes of the tokenizer.

    Raises UserError for an unknown tokenizer kind or pre-tokenisation, and for damaged lists.
    """
    kind = values.get("model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise UserError(f"{path}: it has a tokenizer of kind {kind!r}; known are {', '.join(builders)}: {INSTEAD}")
    pieces: list[str] = values.get("tokens") or []
    if not pieces or len(set(pieces)) != len(pieces):
        raise UserError(f"{path}: its vocabulary is empty or names a token twice ({len(pieces)} tokens): {INSTEAD}")
    kinds: list[int] = values.get("token_type") or [Kind.NORMAL] * len(pieces)
    while pieces and kinds[len(pieces) - 1] == Kind.UNUSED and FILLER.fullmatch(pieces[-1]):
        pieces = pieces[:-1]
    kinds = kinds[: len(pieces)]
    special: dict[str, str] = {}
    for name, key in SPECIAL_TOKENS.items():
        if (index := values.get(key)) is not None:
            if index >= len(pieces):
                raise UserError(f"{path}: {PREFIX}{key} is {index}, but there are {len(pieces)} tokens: {INSTEAD}")
            special[name] = pieces[index]
    tokenizer, add_bos = builders[kind](path, values, pieces, kinds)
    bos = special.get("bos_token") if values.get("add_bos_token", add_bos) else None
    eos = special.get("eos_token") if values.get("add_eos_token", False) else None
    if bos or eos:
        tokenizer.post_processor = template(tokenizer, bos, eos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special, **more)


def _byte_level(path: Path, values: dict[str, Any], pieces: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    """Build a BPE over GPT-2's byte alphabet."""
    name = values.get("pre")
    if name not in SPLITTINGS:
        found = "does not say how its tokenizer splits text" if name is None else f"splits text as {name!r}"
        raise UserError(f"{path}: it {found}; known are {', '.join(sorted(SPLITTINGS))}: {INSTEAD}")
    splitting = SPLITTINGS[name]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    # As in llama.cpp, the first space after the first character separates the halves.
    merges = [(merge[: (space := merge.index(" ", 1))], merge[space + 1 :]) for merge in values.get("merges") or ()]
    try:
        tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=splitting.ignore_merges))
    except Exception as error:  # `tokenizers` has no error type for merges of unknown tokens
        raise UserError(f"{path}: its tokenizer is damaged ({error}): {INSTEAD}") from None
    if (normalizer := splitting.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    add_special_pieces(tokenizer, pieces, kinds)
    return tokenizer, splitting.add_bos


def _sentencepiece(path: Path, values: dict[str, Any], pieces: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    scores = values.get("scores")
    if scores is None or len(scores) < len(pieces):
        raise UserError(f"{path}: its tokenizer has {len(scores or ())} scores for {len(pieces)} tokens: {INSTEAD}")
    return sentencepiece_bpe.build(
        pieces,
        scores[: len(pieces)],
        kinds,
        add_space_prefix=values.get("add_space_prefix", True),
        remove_extra_whitespaces=values.get("remove_extra_whitespaces", False),
    ), True


def _chat_templates(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    """Return the template, or all templates by name if there are several."""
    default = metadata.get("tokenizer.chat_template")
    start = "tokenizer.chat_template."
    named = {key[len(start) :]: value for key, value in metadata.items() if key.startswith(start)}
    if not named:
        return default
    return {**({"default": default} if default else {}), **named}
