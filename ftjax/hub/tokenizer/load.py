"""Loads a model's tokenizer from a folder, the Hub or a GGUF file; never runs code that comes with the model."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ftjax.config import ModelConfig
from ftjax.errors import UserError
from ftjax.hub.fetch import resolve_tokenizer
from ftjax.hub.gguf.tokenizer import gguf_tokenizer
from ftjax.hub.tokenizer.sentencepiece_folder import SENTENCEPIECE, is_bpe, sentencepiece_tokenizer
from ftjax.models.facts import read_object

# AutoTokenizer can load a folder with at least one of these.
VOCABULARIES = ("tokenizer.json", SENTENCEPIECE, "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(model: ModelConfig) -> Any:
    """Load a `PreTrainedTokenizerFast` as the checkpoint saved it, with the tokens that the configuration adds.

    `model.tokenizer` replaces the model's own tokenizer. `model.chat_template` (a template, a .jinja file, or the name of
    one of the tokenizer's templates) replaces its template.

    Raises UserError if there is none, or it cannot be read.
    """
    revision = None if model.tokenizer else model.revision
    asked = model.tokenizer or model.path
    source = resolve_tokenizer(asked, revision)
    if source.is_file():
        tokenizer = gguf_tokenizer(source)
    elif (source / SENTENCEPIECE).is_file() and not (source / "tokenizer.json").is_file() and is_bpe(source / SENTENCEPIECE):
        # transformers converts such a folder without the pieces' scores, which gives other ids for runs of spaces.
        tokenizer = sentencepiece_tokenizer(source)
    else:
        tokenizer = _from_folder(source, asked)
    if model.chat_template is not None:
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        given = model.chat_template
        tokenizer.chat_template = named[given] if given in named else read_chat_template(given)
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    # Existing tokens keep their own rules (spaces beside them, normalisation).
    tokenizer.add_tokens([token for token in model.add_tokens if token not in added])
    tokenizer.add_tokens([token for token in model.add_special_tokens if not added.get(token)], special_tokens=True)
    return tokenizer


def _from_folder(folder: Path, asked: str) -> Any:
    names = sorted(p.name for p in folder.iterdir())
    if not set(names) & set(VOCABULARIES):
        raise UserError(
            f"{asked}: expected a tokenizer (tokenizer.json or {SENTENCEPIECE}); found {', '.join(names[:10]) or 'nothing'}. "
            "Give the folder or Hub id of the right one as model.tokenizer"
        )
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        read_object(folder / name)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    # It raises OSError, ValueError, KeyError, and bare Exception from Rust, all of them about the files.
    except Exception as error:
        read_object(folder / "tokenizer.json")  # says where it is malformed; takes a while, so not before
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs Python code that comes with the model, which ftjax never runs"
        raise UserError(
            f"{asked}: the tokenizer cannot be loaded: {reason}. Give another tokenizer's folder or Hub id as model.tokenizer"
        ) from None


def read_chat_template(given: str) -> str:
    """Return the chat template: `given` itself, or the content of the file if it is a name without braces.

    Raises UserError if there is no such file.
    """
    if "{" in given or "\n" in given:
        return given
    file = Path(given).expanduser()
    if not file.is_file():
        raise UserError(f"model.chat_template: {given}: expected a Jinja template or the path of a .jinja file; found neither")
    return file.read_text(encoding="utf-8")
