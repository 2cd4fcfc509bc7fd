"""Whole conversations that a reward model scores at their last token."""

import numpy as np
import pytest
from data_tokenizers import CHATML, WITH_BOS, WITHOUT_ENDS, byte_level, spaced
from pair_sets import balanced, load, talk, units, write

from ftjax.data.scored import Scored


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


PAIR = {"prompt": "Hello", "chosen": " world", "rejected": " you"}


def test_a_token_more_gives_the_last_one_its_weight(tmp_path):
    tokenizer = byte_level()
    [unit] = units(load(write(tmp_path / "a.jsonl", PAIR), Scored(), tokenizer))
    for document, text in zip(unit, ("Hello world", "Hello you"), strict=True):
        assert document.tokens.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id, 0]
        assert document.weights.tolist() == [0] * (len(document.tokens) - 1) + [1]
        assert document.labels.tolist() == [0]


def test_a_batch_scores_the_last_token_of_each_text(tmp_path):
    """With the margin of the row there, once."""
    rows = [{**PAIR, "margin": 1.5}, {**PAIR, "chosen": " I am", "margin": "0.5"}, {**PAIR, "chosen": " 2"}]
    tokenizer = byte_level()
    split = load(write(tmp_path / "a.jsonl", *rows), Scored(), tokenizer, max_length=64)
    found = {}
    for batch in split.batches(2, seed=0, shuffle=True, epochs=1):
        arrays = (batch[name] for name in ("tokens", "weights", "labels", "segment_ids"))
        for tokens, weights, labels, segments in zip(*arrays, strict=True):
            for number in range(1, int(segments.max()) + 1):
                own = np.flatnonzero(segments == number)
                assert weights[own].tolist() == [0] * (len(own) - 2) + [1, 0] and tokens[own[-2]] == tokenizer.eos_token_id
                found[tokenizer.decode(tokens[own[:-2]]), number % 2] = float(labels[own[-2]])
    assert found == {
        ("Hello world", 1): 1.5, ("Hello I am", 1): 0.5, ("Hello 2", 1): 0, ("Hello you", 0): 0,
    }  # fmt: skip


@pytest.mark.parametrize("make, template", [(byte_level, CHATML), (byte_level, WITHOUT_ENDS), (spaced, WITH_BOS)])
def test_a_conversation_is_what_its_template_writes(make, template, tmp_path):
    """Whoever has it scored gives the model these tokens; nothing is added."""
    tokenizer = make(template)
    for answer in ("fine", "\nfine."):
        row = {"prompt": talk("Hello"), "chosen": answer, "rejected": "no"}
        [[chosen, rejected]] = units(load(write(tmp_path / "a.jsonl", row), Scored(), tokenizer))
        for document, text in ((chosen, answer), (rejected, "no")):
            ids = tokenizer.apply_chat_template(talk("Hello", text), return_dict=True)["input_ids"]
            assert document.tokens.tolist() == [*ids, 0]


def test_a_text_is_tokenised_as_a_whole(tmp_path):
    """Also where a token crosses from the prompt into the answer, as nothing is generated there."""
    tokenizer = byte_level()
    row = {"prompt": "Hello wor", "chosen": "ld", "rejected": "k"}
    [[chosen, _]] = units(load(write(tmp_path / "a.jsonl", row), Scored(), tokenizer))
    whole, *parts = (tokenizer(text)["input_ids"] for text in ("Hello world", "Hello wor", "ld"))
    assert chosen.tokens[:-2].tolist() == whole != [*parts[0], *parts[1]]


@pytest.mark.parametrize("policy", ["right", "left", "middle"])
def test_what_remains_of_a_long_text_is_scored_at_its_end(policy, tmp_path):
    tokenizer = byte_level()
    row = {**PAIR, "chosen": f"{' world' * 40} a", "margin": 2}
    path = write(tmp_path / "a.jsonl", row)
    [[whole, short]] = units(load(path, Scored(), tokenizer))
    split = load(path, Scored(), tokenizer, max_length=32, truncation=policy)
    [[chosen, rejected]] = units(split)
    assert rejected.tokens.tolist() == short.tokens.tolist() and len(chosen.tokens) + len(rejected.tokens) == 32
    ids, kept = whole.tokens[:-1], len(chosen.tokens) - 1
    front = -(-kept // 2)
    wanted = {"right": ids[:kept], "left": ids[-kept:], "middle": np.r_[ids[:front], ids[front - kept :]]}[policy]
    assert chosen.tokens.tolist() == [*wanted.tolist(), 0]
    assert chosen.weights.tolist() == [0] * kept + [1] and chosen.labels.tolist() == [2]
    assert dict(balanced(split.report).truncated) == {policy: 1}
