"""Alignment of the tokens of two tokenizers, beside TRL's, and what cannot be aligned."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import pytest
from data_tokenizers import byte_level, spaced
from merging_tokenizer import STUDENT, TEACHER, merging_tokenizer
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import PreTrainedTokenizerFast
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.utils import encode_with_byte_offsets

from ftjax.data.align import align
from ftjax.data.encoder import Encoded
from ftjax.data.token_bytes import TokenBytes
from ftjax.errors import UserError

TEXTS = [" Hello world, naïve café 你好 \U0001f600!\n\tThe answer is 42.", "Lily loved to play.", " four", "?"]


def document(tokenizer, answer, prompt="Say: ", ends=True):
    """A prompt and an answer, of which the latter is trained."""
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    parts[1] += [tokenizer.eos_token_id] * ends
    weights = np.repeat(np.array([0, 1], np.float32), list(map(len, parts)))
    return Encoded(np.array([*parts[0], *parts[1]], np.int32), weights, "x")


def groups(own, other, tokenizers):
    """Ranges of tokens of both documents."""
    pair = align(own, other, *(TokenBytes(tokenizer, "x") for tokenizer in tokenizers))
    found = []
    for before in np.flatnonzero(pair.partners):
        last, their_last = int(before) + 1, int(pair.partners[before])
        firsts = [np.flatnonzero(values == last) + 1 for values in (pair.links, pair.of)]
        found.append(tuple(
            (int(first[0]) if len(first) else end, end) for first, end in zip(firsts, (last, their_last), strict=True)
        ))  # fmt: skip
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("names", ["bytes merges", "bytes pieces", "pieces merges"])
def test_groups_are_the_same_text(text, names):
    made = {"bytes": byte_level, "pieces": spaced, "merges": lambda: merging_tokenizer(TEACHER)}
    tokenizers = [made[name]() for name in names.split()]
    if "merges" in names:
        text = " fourteen yes, because it is red.".removeprefix(" " * ("pieces" in names))
    documents = [document(tokenizer, text) for tokenizer in tokenizers]
    found = groups(*documents, tokenizers)
    whole, texts = [b"", b""], [TokenBytes(tokenizer, "x") for tokenizer in tokenizers]
    for pair in found:
        for side, (first, last) in enumerate(pair):
            whole[side] += texts[side].text(documents[side].tokens[first : last + 1].tolist())
        assert whole[0].strip() == whole[1].strip()
    assert whole[0].decode().strip() == text.strip()
    assert found[-1] == tuple((len(one.tokens) - 1,) * 2 for one in documents), "the ends are a group"


@pytest.mark.parametrize("text", TEXTS)
def test_trl(text):
    """Two tokenizers of byte-level BPE; TRL has no other."""
    tokenizers = [byte_level(), _smaller()]
    offsets = [encode_with_byte_offsets(tokenizer.backend_tokenizer, [text])[0][1] for tokenizer in tokenizers]
    size = len(text.encode())
    want = ULDLoss._align_by_byte_offsets(*([*one, (size, size)] for one in offsets))
    documents = [document(tokenizer, text) for tokenizer in tokenizers]
    starts = [int(np.argmax(one.weights)) for one in documents]
    assert groups(*documents, tokenizers) == [
        tuple((start + one[0], start + one[-1]) for start, one in zip(starts, pair, strict=True))
        for pair in zip(*want, strict=True)
    ]
    assert len(want[0]) < max(map(len, offsets)) + 1 or len(text) < 6, "some groups have several tokens"


def _smaller():
    values = byte_level()
    made = values.backend_tokenizer.to_str()
    tokenizer, trainer = Tokenizer.from_str(made), trainers.BpeTrainer(vocab_size=300, show_progress=False)
    tokenizer.model = models.BPE()
    trainer.initial_alphabet = values.backend_tokenizer.pre_tokenizer.alphabet()
    tokenizer.train_from_iterator(["The four Helloes answered: play, playing. Lilly is 42\n"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def test_what_a_template_puts_before_the_answer_and_texts_that_part():
    """The text is aligned from where both have it to the first byte that differs, and ends are compared after equal texts."""
    tokenizers = [merging_tokenizer(STUDENT), merging_tokenizer(TEACHER)]

    def spans(own, other):
        documents = [document(tokenizer, text, "a") for tokenizer, text in zip(tokenizers, (own, other), strict=True)]
        return [
            "".join(tokenizers[0].decode([token]) for token in documents[0].tokens[first : last + 1])
            for (first, last), _ in groups(*documents, tokenizers)
        ]

    assert spans("yes", "thinking\n\nyes") == ["yes", "</s>"]
    assert spans(" red", "red") == ["r", "ed", "</s>"] and spans("red", "\n red") == ["r", "ed", "</s>"]
    assert spans("four", "fog") == ["fo"] and spans("is 4", "is 5") == ["is", " "] and spans("4", "5") == []
    assert spans("", "") == ["</s>"]


def test_tokens_that_both_have():
    own, other = TokenBytes(byte_level(), "x"), TokenBytes(spaced(), "x")
    found = dict(own.matches(other))
    names = {own.names[mine]: other.names[theirs] for mine, theirs in found.items()}
    assert names["Ġto"] == "▁to" and names["a"] == "a" and names["<|im_end|>"] == "<|im_end|>"
    assert names["<|endoftext|>"] == "</s>", "what ends a text"
    assert names["Ċ"] in ("\n", "<0x0A>") and len(set(found.values())) == len(found)
    assert "Ã" in names and names["Ã"] == "<0xC3>", "a part of a character"


def test_a_decoder_that_joins_words_is_refused():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match=r"TEACHER: texts of its tokenizer cannot be aligned.*WordPiece"):
        TokenBytes(tokenizer, "TEACHER")
