"""Writes a tokenizer as the keys of a GGUF file, so that llama.cpp gives the same ids; refuses one where it would not.

Two kinds: a BPE over bytes (`gpt2`), whose way to split text llama.cpp knows by a name, and a BPE over characters with
SentencePiece's scores (`llama`). The keys are read back by `ftjax.hub.gguf.tokenizer`, which does what llama.cpp does, and the
ids of texts compared.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ftjax.data.template import Template
from ftjax.errors import UserError
from ftjax.hub.gguf.pretokenizer import SPLITTINGS, names_of
from ftjax.hub.gguf.scores import piece_scores
from ftjax.hub.gguf.tokenizer import build_tokenizer
from ftjax.hub.tokenizer.sentencepiece_bpe import BYTES, SPACE, Kind

# Texts on which tokenizers differ: spaces, line ends, digits, contractions, scripts, characters of several code points.
PROBES = (
    "Hello, world!", " a", "  two  spaces   three     five       seven ", "line\n\nline\r\n\ttab",
    "In 2024 it cost 1234567.89 dollars (12 % more).",
    "I'm sure they'LL say it's 'fine', don't you?", "def f(x):\n    return x**2  # ok\n", "camelCaseWords HTTPServer ÉCOLE",
    "naïve café \u2013 “quoted” … 50€", "日本語のテキスト 漢字かな交じり文", "Привет, как дела? Ещё раз", "नमस्ते दुनिया",
    "العربية والعبرية עברית", "한국어 문장입니다.", "🙂🙂 👩‍👩‍👧 🇫🇷", "a/b//c https://example.org/?q=1&r=2", "----====____####",
    "x\u00a0y\u3000z", "{\"key\": [1, 22, 333]}",
)  # fmt: skip
TURNS = (
    ({"role": "user", "content": PROBES[0]},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBES[5]}),
    tuple({"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(PROBES[:9])),
)
# llama.cpp ends an answer at these by their text (`special_eog_ids` in its src/llama-vocab.cpp).
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>",
    "<|end_of_text|>", "<eos>",
)  # fmt: skip
INSTEAD = "export a folder instead (--merge)"
# llama.cpp strips spaces after special tokens, but after these not, in models whose name has one of `STRIPPED`.
UNSTRIPPED, STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}, ("phi-3", "phi3")


def tokenizer_keys(
    tokenizer: Any, rows: int, ends: Collection[int], bos: int | None, folder: Path | None, note: Callable[[str], None]
) -> dict[str, Any]:
    """Return the keys under `tokenizer.` and their values.

    Args:
        tokenizer: a `PreTrainedTokenizerFast`.
        rows: rows of the embedding.
        ends: ids that end an answer.
        bos: config.json's `bos_token_id`, for a tokenizer without BOS.
        folder: where the tokenizer comes from, for SentencePiece's model.
        note: called with remarks for the user.

    Raises UserError if llama.cpp would give other ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model = made["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused(f"it is of type {model['type']}, and llama.cpp's are BPE over bytes or SentencePiece's BPE")
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    if max(pieces) >= rows:
        raise _refused(f"it has the id {max(pieces)}, and the model {rows} rows")
    added = tokenizer.added_tokens_decoder
    steps = _steps(made["pre_tokenizer"], "pretokenizers")
    tokens = [pieces.get(index, f"[PAD{index}]") for index in range(rows)]
    if any(step["type"] == "ByteLevel" for step in steps):
        values: dict[str, Any] = {
            "model": "gpt2",
            "pre": _pre(tokenizer, made, steps),
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
            "token_type": [_kind(index, tokens, pieces, added) for index in range(rows)],
        }
        candidates = [values]
    elif model.get("byte_fallback"):
        kinds = [_kind(index, tokens, pieces, added, unknown=model["unk_token"]) for index in range(rows)]
        scores = piece_scores(model["merges"], tokens, kinds, folder)
        if scores is None:
            raise _refused("its merges do not follow from a score of each token, as SentencePiece's do")
        values = {"model": "llama", "pre": "default", "token_type": kinds, "scores": scores}
        candidates = [{**values, "add_space_prefix": prefix} for prefix in (True, False)]
    else:
        raise _refused("it is a BPE that is neither over bytes nor SentencePiece's")
    more = {"tokens": tokens, **_special(tokenizer, ends, bos, rows), **_added_around(tokenizer)}
    chosen = _agreeing(tokenizer, [{**values, **more} for values in candidates], note)
    _note_ends(tokenizer, chosen, ends, note)
    return {f"tokenizer.ggml.{key}": value for key, value in chosen.items()} | _templates(tokenizer.chat_template)


def _refused(why: str) -> UserError:
    return UserError(f"this tokenizer cannot be written as GGUF: {why}; {INSTEAD}")


def _steps(one: Mapping[str, Any] | None, several: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, one or a sequence of them."""
    if one is None:
        return []
    return [step for inner in one[several] for step in _steps(inner, several)] if one["type"] == "Sequence" else [one]


def _pre(tokenizer: Any, made: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """Return llama.cpp's name for the way in which a tokenizer splits text."""
    changed = [step["type"] for step in _steps(made["normalizer"], "normalizers") if step["type"] != "NFC"]
    names = [] if changed else names_of(steps)
    if not names:
        patterns = [step["pattern"].get("Regex", step["pattern"]) for step in steps if step["type"] == "Split"]
        how = [*changed, *(step["type"] for step in steps), *patterns]
        raise _refused(f"llama.cpp has no name that ftjax knows for how it splits text ({', '.join(map(str, how))})")
    whole = bool(made["model"].get("ignore_merges"))
    same = [name for name in names if SPLITTINGS[name].ignore_merges == whole]
    if not same and (odd := _not_by_merges(tokenizer, made)):
        which = "takes" if whole else "does not take"
        raise _refused(f"it {which} whole tokens without merges, as llama.cpp's {names[0]!r} does not; {odd!r} shows it")
    return (same or names)[0]


def _not_by_merges(tokenizer: Any, made: Mapping[str, Any]) -> str | None:
    """Return a token that merges do not lead to; without one, it makes no difference whether whole tokens are looked up
    first."""
    model = Tokenizer.from_str(json.dumps({**made, "model": {**made["model"], "ignore_merges": False}})).model
    added = tokenizer.get_added_vocab()
    return next((p for p in made["model"]["vocab"] if p not in added and len(model.tokenize(p)) != 1), None)


def _kind(
    index: int, tokens: Sequence[str], pieces: Mapping[int, str], added: Mapping[int, Any], unknown: str | None = None
) -> Kind:
    if index not in pieces:
        return Kind.UNUSED
    token, text = added.get(index), tokens[index]
    if unknown is not None and text == unknown:
        return Kind.UNKNOWN
    if token is not None and token.special:
        return Kind.CONTROL
    if unknown is not None and text in BYTES:
        return Kind.BYTE
    # SentencePiece's pieces of several spaces: text has spaces there, so that merges find them and not the added token.
    return Kind.NORMAL if token is None or (unknown is not None and SPACE in text) else Kind.USER_DEFINED


def _special(tokenizer: Any, ends: Collection[int], bos: int | None, rows: int) -> dict[str, int]:
    """Return the ids of special tokens; llama.cpp ends an answer at three of them."""
    end = tokenizer.eos_token_id
    ordered = sorted(ends, key=lambda index: (index != end, index))
    ids = dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ordered, strict=False))
    if not ids and end is not None:
        ids["eos_token_id"] = end
    # Without any, llama.cpp would take token 11 for BOS.
    known = (tokenizer.bos_token_id, bos, ids.get("eos_token_id"))
    ids["bos_token_id"] = next((index for index in known if index is not None and index < rows), None)
    ids |= {"unknown_token_id": tokenizer.unk_token_id, "padding_token_id": tokenizer.pad_token_id}
    return {key: int(index) for key, index in ids.items() if index is not None and index < rows}


def _added_around(tokenizer: Any) -> dict[str, bool]:
    """Return whether BOS and EOS are put around a text."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if whole == bos * before + bare + eos * after:
            return {"add_bos_token": before, "add_eos_token": after}
    raise _refused(f"it puts tokens around a text that are neither BOS nor EOS ({whole} for 'a')")


def _templated(tokenizer: Any) -> Iterable[str]:
    template = Template(tokenizer) if isinstance(tokenizer.chat_template, str) else None
    for turns in TURNS if template is not None else ():
        try:
            yield template.render(turns, turns[-1]["role"] == "user", "a probe")
        except UserError:  # it takes no system message, or no answer first
            continue


def _agreeing(tokenizer: Any, candidates: Sequence[dict[str, Any]], note: Callable[[str], None]) -> dict[str, Any]:
    """Return the first of the candidates that gives the tokenizer's ids for all probes, or else for those through its chat
    template."""
    chats, found = list(_templated(tokenizer)), []
    for values in candidates:
        theirs = build_tokenizer(Path("GGUF"), values)
        bad = [text for text in PROBES if tokenizer(text).input_ids != theirs(text).input_ids]
        plain = {"add_special_tokens": False}
        lost = [text for text in chats if tokenizer(text, **plain).input_ids != theirs(text, **plain).input_ids]
        found.append((bool(lost), len(bad), bad, lost, values))
    _, _, bad, lost, values = min(found, key=lambda one: one[:2])
    # A text may begin otherwise (llama.cpp puts a space before a space), but what follows must be the same.
    wrong = lost or [text for text in bad if not chats and not text.startswith(" ")]
    if wrong:
        ours, theirs = (one(wrong[0]).input_ids[:12] for one in (tokenizer, build_tokenizer(Path("GGUF"), values)))
        raise _refused(f"llama.cpp would give {theirs} for {wrong[0][:40]!r}, and not {ours}")
    if bad:
        where = "through the chat template, but not for plain text" if chats else "but for texts"
        note(f"llama.cpp gives the same ids {where} such as {bad[0]!r}")
    added = tokenizer.added_tokens_decoder.values()
    odd = [token.content for token in added if token.lstrip or token.rstrip or token.single_word]
    if odd and not strips_after_special_tokens(tokenizer):
        note(f"llama.cpp keeps spaces beside {', '.join(odd[:5])}, which the tokenizer takes away")
    return values


def strips_after_special_tokens(tokenizer: Any) -> bool:
    """Return whether it is Phi-3's tokenizer, which takes spaces away after special tokens; llama.cpp knows it by the model's
    name."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content not in UNSTRIPPED]
    strips = [token.rstrip and not token.lstrip for token in added]
    return bool(strips) and all(strips)


def model_name(name: str, tokenizer: Any) -> str:
    """Return the name of a model with which llama.cpp treats its tokenizer as it should be."""
    named, strips = any(one in name.lower() for one in STRIPPED), strips_after_special_tokens(tokenizer)
    if named == strips:
        return name
    return f"Phi-3 {name}" if strips else re.sub(r"(?i)phi-?3", "Phi 3", name)


def _note_ends(tokenizer: Any, values: Mapping[str, Any], ends: Collection[int], note: Callable[[str], None]) -> None:
    written = {values.get(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")}
    left = [values["tokens"][index] for index in sorted(set(ends) - written)]
    if left := [text for text in left if text not in ENDS]:
        note(
            f"a GGUF file has room for three tokens that end an answer; llama.cpp will not stop at {', '.join(left)} by itself"
        )


def _templates(chat_template: str | Mapping[str, str] | None) -> dict[str, str]:
    if not chat_template:
        return {}
    named = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template)
    start = "tokenizer.chat_template"
    return {start if name == "default" else f"{start}.{name}": text for name, text in named.items()}
