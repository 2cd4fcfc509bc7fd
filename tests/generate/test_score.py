"""Tests log-likelihoods against transformers' logits."""

import numpy as np
import pytest
import torch
from oracle import hf_logits
from transformers import AutoModelForCausalLM

import ftjax.generate.score as score
from ftjax.errors import UserError
from ftjax.generate.session import Generator


@pytest.fixture(scope="module")
def storyteller(stories) -> Generator:
    return Generator(str(stories), dtype="float32")


def want(hf, prompt: list[int], completion: list[int]) -> tuple[np.ndarray, bool]:
    logits = torch.tensor(hf_logits(hf, np.array([prompt + completion]))[0])
    logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    picked = logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]
    return picked.numpy(), bool((logprobs.argmax(-1).numpy() == np.array(completion)).all())


@pytest.mark.parametrize("logits", [score.LOGITS, 3 * 512 * 2], ids=["at once", "in parts"])
def test_scores_are_transformers(trained_llama, monkeypatch, logits):
    monkeypatch.setattr(score, "LOGITS", logits)
    storyteller, hf = Generator(str(trained_llama), dtype="float32"), AutoModelForCausalLM.from_pretrained(trained_llama)
    greedy = storyteller.generate(["Once upon a time"], max_new_tokens=7)[0].tokens
    start = storyteller.encode("Once upon a time")
    pairs = [(start, greedy), ([1], [300, 301, 302]), (start, [7]), (start[:2], list(range(20, 45)))]
    scores = storyteller.score([p for p, _ in pairs], [c for _, c in pairs], batch_size=3)
    for (prompt, completion), found in zip(pairs, scores, strict=True):
        values, is_greedy = want(hf, prompt, completion)
        np.testing.assert_allclose(found.logprobs, values, atol=1e-4)
        assert found.tokens == completion and found.greedy == is_greedy
        assert found.total == pytest.approx(values.sum(), abs=1e-3)
    assert scores[0].greedy and not scores[1].greedy


def test_texts_are_tokenised_as_in_training(storyteller):
    tokenizer = storyteller.tokenizer
    whole = tokenizer("Once upon a time there")["input_ids"]
    prompt = tokenizer("Once upon a time")["input_ids"]
    found = storyteller.score(["Once upon a time"], [" there"])[0]
    assert prompt + found.tokens == whole
    merging = storyteller.score(["Once upon a ti"], ["me"])[0]  # tokenised as one text, `time` would span the boundary
    assert merging.tokens == tokenizer("me", add_special_tokens=False)["input_ids"]


def test_refused(storyteller):
    with pytest.raises(UserError, match="completion 2 is empty"):
        storyteller.score(["a", "b"], ["c", ""])
    with pytest.raises(UserError, match="completion 1 ends at token 521"):
        storyteller.score([[1] * 510], [[4] * 11])
