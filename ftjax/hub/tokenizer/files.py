"""Writes the tokenizer files of an output for transformers 4 and 5 and tools based on them.

Without added tokens they are the base's own, byte for byte. `save_pretrained` of transformers 5 names classes that version
4 lacks, and drops data that llama.cpp's converter reads; files that must be rewritten are those of a
`PreTrainedTokenizerFast`, which gives the same ids in both.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ftjax.config import ModelConfig
from ftjax.hub.fetch import resolve_tokenizer
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.tokenizer.sentencepiece_folder import SENTENCEPIECE, read_pieces
from ftjax.models.facts import read_object

CONFIG, TOKENIZER, TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # folder of further templates by name
VOCABULARIES = (TOKENIZER, "vocab.json")  # without one of them transformers would convert SentencePiece's model again
OWN = (
    TOKENIZER, CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", SENTENCEPIECE,
    "spiece.model", "tekken.json", TEMPLATE, "chat_template.json",
)  # fmt: skip
CLASS = "PreTrainedTokenizerFast"
INPUTS = ["input_ids", "attention_mask"]  # transformers 4 would add token_type_ids, which decoders refuse
# Keys of transformers 5 that version 4 does not know, or that describe the machine that wrote them.
NEWER = ("backend", "is_local", "local_files_only", "auto_map", "processor_class")


def write_tokenizer(folder: Path, tokenizer: Any, model: ModelConfig, base: Path) -> None:
    """Write the files of `load_tokenizer(model)` into an output folder, in which a whole model's config.json exists
    already.

    Args:
        base: the base model's folder or file.
    """
    source = resolve_tokenizer(model.tokenizer) if model.tokenizer else base
    if not _was_added_to(tokenizer, model) and _is_of_use(
        source, tokenizer, whole=(folder / "config.json").is_file() and source == base
    ):
        _carry(source, folder, tokenizer.chat_template if model.chat_template is not None else None)
    else:
        _write(source, folder, tokenizer)
    if not (folder / SENTENCEPIECE).is_file():
        found = next((one / SENTENCEPIECE for one in (source, base) if _has_pieces_of(one / SENTENCEPIECE, tokenizer)), None)
        if found is not None:
            shutil.copyfile(found, folder / SENTENCEPIECE)


def _was_added_to(tokenizer: Any, model: ModelConfig) -> bool:
    """Return whether tokens of the configuration are new, or were not special before."""
    if not model.add_tokens and not model.add_special_tokens:
        return False
    before = load_tokenizer(model.model_copy(update={"add_tokens": [], "add_special_tokens": []}))
    return _added(before) != _added(tokenizer)


def _added(tokenizer: Any) -> dict[str, Any]:
    return {str(index): token.__getstate__() for index, token in sorted(tokenizer.added_tokens_decoder.items())}


def _is_of_use(source: Path, tokenizer: Any, whole: bool) -> bool:
    """Return whether transformers 4 and 5 read a folder's files, and read them in the output as they were read here.

    Args:
        whole: they are beside the same config.json, in which transformers finds the class too.
    """
    if not source.is_dir() or not any((source / name).is_file() for name in VOCABULARIES):
        return False
    config = read_object(source / CONFIG)
    named = config.get("tokenizer_class") or ""
    if named.endswith("Backend") or isinstance(config.get("extra_special_tokens"), list) or set(NEWER) & set(config):
        return False
    loaded = type(tokenizer).__name__
    same = named.removesuffix("Fast") == loaded or (named, loaded) == (CLASS, "TokenizersBackend")
    return whole or same


def _carry(source: Path, folder: Path, template: str | None) -> None:
    """Copy a folder's files; `template` replaces its chat template, or all of several."""
    for name in OWN:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    named = sorted((source / TEMPLATES).glob("*.jinja"))
    config = read_object(source / CONFIG)
    file = source / TEMPLATE
    own = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if template is None or (template == own and not named):
        for one in named:
            (folder / TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(one, folder / TEMPLATES / one.name)
        return
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    if "chat_template" in config:
        _write_json(folder / CONFIG, {**config, "chat_template": template})


def _write(source: Path, folder: Path, tokenizer: Any) -> None:
    """Save a tokenizer under a class that transformers 4 has too; an equivalent tokenizer.json stays as it was."""
    with TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        shutil.copytree(made, folder, dirs_exist_ok=True)
    if not (folder / TOKENIZER).is_file():  # it does not come from the library tokenizers, and transformers 4 has its class
        return
    own = source / TOKENIZER
    if own.is_file() and read_object(own) == read_object(folder / TOKENIZER):
        shutil.copyfile(own, folder / TOKENIZER)
    saved = {name: value for name, value in read_object(folder / CONFIG).items() if name not in NEWER}
    saved |= {"tokenizer_class": CLASS, "added_tokens_decoder": _added(tokenizer)}
    saved.setdefault("model_input_names", INPUTS)
    saved.setdefault("clean_up_tokenization_spaces", False)
    if isinstance(saved.get("extra_special_tokens"), list):
        saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
    _write_json(folder / CONFIG, saved)


def _has_pieces_of(file: Path, tokenizer: Any) -> bool:
    """Return whether a SentencePiece model has this tokenizer's ids."""
    pieces = read_pieces(file) if file.is_file() else None
    vocabulary = tokenizer.get_vocab()
    return pieces is not None and all(vocabulary.get(piece) == index for index, piece in enumerate(pieces))


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
