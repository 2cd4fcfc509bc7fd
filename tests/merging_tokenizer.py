"""Builds tokenizers of one alphabet whose merges differ, so that a text has other tokens in each."""

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

ALPHABET = string.ascii_lowercase + string.digits + " ?;=+,.\n"
STUDENT = ["es", " y", "ec", "au", "in"]  # some are pairs of the alphabet, some of earlier merges
TEACHER = ["yes", "fo", "ou", "be", "cause", "is", " it", "it", "ed"]


def merging_tokenizer(words: list[str], extra: str = "", first: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer that joins the characters of each of these words; no other token is longer than one.

    Args:
        extra: characters that another tokenizer lacks.
        first: tokens before the alphabet that are never used, so that ids differ.
    """
    merges, tokens = [], ["<pad>", "<s>", "</s>", "<unk>", *(f"<{number}>" for number in range(first)), *extra, *ALPHABET]
    for word in words:
        for size in range(2, len(word) + 1):
            merges.append((word[: size - 1], word[size - 1]))
            tokens.append(word[:size])
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    assert len(vocab) <= 96
    tokenizer = Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_student(folder: Path) -> None:
    merging_tokenizer(STUDENT, "@#").save_pretrained(folder)


def save_teacher(folder: Path) -> None:
    merging_tokenizer(TEACHER, "!", first=3).save_pretrained(folder)
