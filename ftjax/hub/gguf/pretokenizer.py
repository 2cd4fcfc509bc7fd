"""Pre-tokenisation: splits text for a byte-level BPE vocabulary, by the name that a GGUF file gives.

A GGUF file holds no `tokenizer.json`, only the name `tokenizer.ggml.pre`. llama.cpp's converter derives that name from the
ids that the original tokenizer gives a test text. The patterns below are those of the models' own `tokenizer.json`;
llama.cpp quotes them, and lists the pattern of each name, in `src/llama-vocab.cpp` (`llm_tokenizer_bpe`,
`llama_vocab::impl::load`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Steps

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS_AND_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SYMBOLS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SYMBOLS_AND_SLASHES}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SLASHES}"


@dataclass(frozen=True)
class Splitting:
    """One pre-tokenisation.

    Attributes:
        steps: patterns whose matches become separate pieces, applied in order.
        gpt2: whether GPT-2's pattern, built into `ByteLevel`, comes last.
        digits: whether each digit is a separate piece.
        ignore_merges: a piece that is a whole token is that token, whatever the merges would give.
        nfc: text is normalised to NFC first.
        add_bos: llama.cpp's default if the file has no `add_bos_token`.
    """

    steps: tuple[str, ...] = ()
    gpt2: bool = False
    digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        steps: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in self.steps]
        if self.digits:
            steps.append(Digits(individual_digits=True))
        return Steps([*steps, ByteLevel(add_prefix_space=False, use_regex=self.gpt2)])

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


_GPT2 = Splitting(gpt2=True)
_DIGITS = Splitting(gpt2=True, digits=True)
_LLAMA3_SPLITTING = Splitting((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_SPLITTING = Splitting((_QWEN2,), nfc=True)
_GPT4O_SPLITTING = Splitting((_GPT4O,))

SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum", "a.x-4.0", "gigachat"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), _LLAMA3_SPLITTING),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2_SPLITTING),
    "qwen35": Splitting((_QWEN35,), nfc=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O_SPLITTING),
    "tekken": Splitting((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+"), digits=True),
}


def names_of(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all names of a pre-tokenisation, given the steps that a tokenizer.json has for it; none if it has no name."""
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return []
    patterns, digits, gpt2 = [], False, last.get("use_regex", True)
    for step in before:
        if step["type"] == "Digits" and step["individual_digits"]:
            digits = True
            continue
        isolated = step.get("behavior") == "Isolated" and not step["invert"]
        # Keeping only what matches is the same where all of a text does.
        kept = step.get("behavior") == "Removed" and step["invert"] and len(before) == 1
        if step["type"] != "Split" or not (isolated or kept) or digits:
            return []
        patterns.append(step["pattern"].get("Regex"))
    if patterns[-1:] == [GPT2] and not gpt2:
        patterns, gpt2 = patterns[:-1], True
    found = tuple(patterns), gpt2, digits
    return [name for name, one in SPLITTINGS.items() if (one.steps, one.gpt2, one.digits) == found]
