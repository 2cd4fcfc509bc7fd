"""Loads an older tokenizer folder: SentencePiece's `tokenizer.model` and JSON files beside it, without `tokenizer.json`."""

from collections.abc import Container
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from ftjax.errors import UserError
from ftjax.hub.tokenizer import sentencepiece_bpe
from ftjax.hub.tokenizer.sentencepiece_bpe import template
from ftjax.models.facts import read_object

SENTENCEPIECE = "tokenizer.model"
ATTRIBUTES = ("lstrip", "rstrip", "single_word", "normalized", "special")
MORE = ("additional_special_tokens", "extra_special_tokens")  # lists of further special tokens


def read_proto(file: Path) -> Any:
    """Read the `ModelProto` of a SentencePiece model. Raises UserError if it is damaged."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise UserError(f"{file}: not a SentencePiece model, or cut off ({file.stat().st_size:,} bytes); download it again")
    return proto


def read_pieces(file: Path) -> list[str] | None:
    """Return the pieces of a SentencePiece model; None for another file of that name, such as tiktoken's."""
    try:
        return [piece.piece for piece in read_proto(file).pieces]
    except UserError:
        return None


def is_bpe(file: Path) -> bool:
    """Return whether a SentencePiece model is a BPE and not a unigram model."""
    return read_proto(file).trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.BPE


def sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer; its ids are SentencePiece's, with BOS before a text unless the folder says otherwise."""
    proto = read_proto(folder / SENTENCEPIECE)
    config = read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # older folders name their special tokens in a file of its own, which comes first
        config |= read_object(folder / "special_tokens_map.json")
    normalizer = proto.normalizer_spec
    tokenizer = sentencepiece_bpe.build(
        [piece.piece for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
        add_space_prefix=config.get("add_prefix_space", normalizer.add_dummy_prefix) is not False,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
    )
    trainer = proto.trainer_spec
    special = {
        "bos_token": trainer.bos_piece if trainer.bos_id >= 0 else None,
        "eos_token": trainer.eos_piece if trainer.eos_id >= 0 else None,
        "unk_token": trainer.unk_piece,
        "pad_token": trainer.pad_piece if trainer.pad_id >= 0 else None,
    }
    special = {name: _content(config.get(name, own)) for name, own in special.items()}
    more = [_content(token) for name in MORE if isinstance(config.get(name), list) for token in config[name]]
    _add_tokens(folder, tokenizer, config, {*special.values(), *more})
    bos = special["bos_token"] if config.get("add_bos_token", True) else None
    eos = special["eos_token"] if config.get("add_eos_token", False) else None
    if bos or eos:
        tokenizer.post_processor = template(tokenizer, bos, eos)
    chat = folder / "chat_template.jinja"
    chat_template = chat.read_text(encoding="utf-8") if chat.is_file() else config.get("chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=list(dict.fromkeys(more)),
        **{name: token for name, token in special.items() if token is not None},
        **{name: value for name in ("model_max_length", "padding_side") if (value := config.get(name)) is not None},
        **({"chat_template": chat_template} if chat_template else {}),
    )


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _add_tokens(folder: Path, tokenizer: Tokenizer, config: dict[str, Any], special: Container[str | None]) -> None:
    """Add tokens that were added after the SentencePiece model was trained, each with its id.

    Args:
        special: the special tokens, which added_tokens.json does not tell from others.
    """
    added = {int(index): entry for index, entry in config.get("added_tokens_decoder", {}).items()}
    added |= {
        index: {"content": token, "special": token in special}
        for token, index in read_object(folder / "added_tokens.json").items()
        if index not in added
    }
    for index, entry in sorted(added.items()):
        token = AddedToken(entry["content"], **{"normalized": False, **{k: entry[k] for k in ATTRIBUTES if k in entry}})
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(entry["content"]) != index:
            raise UserError(
                f"{folder}: the added token {entry['content']!r} has id {index}, but {SENTENCEPIECE} and the tokens before it "
                f"leave it {tokenizer.token_to_id(entry['content'])}; the files are not of one tokenizer"
            )
