"""Tests text that is decoded token by token."""

import random
from pathlib import Path

import pytest
import real

from ftjax.config import ModelConfig
from ftjax.generate.text import StopStrings, TextStream
from ftjax.hub.tokenizer.ends import turn_end
from ftjax.hub.tokenizer.load import load_tokenizer

TEXTS = ["Once upon a time, there was  a fox.\n\n  It said: “hé!” 🦊🎉 done", "日本語のテキスト 🇩🇪 ok", "   leading", "x", ""]


@pytest.fixture(params=["bytes", "untrained", "made_pieces", *real.LLAMAS, *real.PIECES], ids=lambda one: Path(one).name)
def tokenizer(request):
    if request.param == "bytes":  # byte-level BPE without merges: every byte is a token
        from tokenizers import Tokenizer, decoders, pre_tokenizers
        from tokenizers.models import BPE
        from transformers import PreTrainedTokenizerFast

        vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        made = Tokenizer(BPE(vocab, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    folder = request.param if isinstance(request.param, Path) else request.getfixturevalue(request.param)
    return load_tokenizer(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.feed([token]) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=True)


def test_any_tokens_in_any_portions(tokenizer):
    """Random ids, with broken characters and special tokens, give the same text in any portions."""
    rng = random.Random(0)
    for _ in range(40):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(30))]
        stream, rest, text = TextStream(tokenizer), list(ids), ""
        while rest:
            size = rng.randrange(1, 5)
            text, rest = text + stream.feed(rest[:size]), rest[size:]
        assert text + stream.finish() == tokenizer.decode(ids, skip_special_tokens=True)


def test_bytes_on_both_sides_of_a_special_token_are_one_run(made_pieces):
    """Decoding leaves the token out, and the second byte makes the first one part of no character."""
    tokenizer = load_tokenizer(ModelConfig(path=str(made_pieces)))
    ids = tokenizer.convert_tokens_to_ids(["<0x4F>", "</s>", "<0xBF>"])
    stream = TextStream(tokenizer)
    whole = "".join(stream.feed([token]) for token in ids) + stream.finish()
    assert whole == tokenizer.decode(ids, skip_special_tokens=True) == "\N{REPLACEMENT CHARACTER}" * 2


def test_the_space_behind_the_prompt_stays(tokenizer):
    """Decoded by itself, a SentencePiece answer would lose its first space."""
    ids = tokenizer("Once upon a time there was")["input_ids"]
    prompt = tokenizer("Once upon a time")["input_ids"]
    stream = TextStream(tokenizer, prompt)
    assert stream.feed(ids[len(prompt) :]) + stream.finish() == " there was"


def test_stop_strings():
    stops = StopStrings(["</s>", "\nUser:", ""])
    assert stops.strings == ("</s>", "\nUser:")
    assert stops.find("a </s> b\nUser:") == 2 and stops.find("a </s> b\nUser:", 3) == 8 and stops.find("a") is None
    assert stops.find("User:</s>", -4) == 5
    assert stops.open("text\nUs") == 3 and stops.open("text</") == 2 and stops.open("text") == 0 and stops.open("") == 0
    assert StopStrings().find("x") is None and StopStrings().open("x") == 0


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}<u>{{ m.content }}<end_of_turn>\n{% endfor %}", "<end_of_turn>"),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "<end>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_turn_end(template, found):
    from generate.words import words

    tokenizer = words(eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>", "<u>"]})
    tokenizer.chat_template = template
    assert turn_end(tokenizer) == (None if found is None else tokenizer.convert_tokens_to_ids(found))
