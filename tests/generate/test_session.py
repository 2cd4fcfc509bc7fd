"""Tests Generator: its answers, when it stops, and what it refuses."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import Case, hf_logits, load, make_hf, one_device, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import ftjax.generate.session as session
from ftjax.config import MeshConfig
from ftjax.errors import UserError
from ftjax.generate.paged import PagedBatch
from ftjax.generate.session import Generator
from ftjax.mesh import make_mesh

STORIES = ["Once upon a time", "Lily and her mom went to the big park. They saw", "Tom"]
NEW = 60  # tokens of an answer; tests that need no other number share the programs for so many, and for these prompts


@pytest.fixture(scope="module")
def storyteller(stories) -> Generator:
    return Generator(str(stories), dtype="float32")


def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def hf(stories):
    return reference(stories)


@pytest.fixture
def full_stop(storyteller) -> int:
    return storyteller.tokenizer.convert_tokens_to_ids(".")


def hf_generate(hf, text: str, **options) -> tuple[list[int], str]:
    model, tokenizer = hf
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        out = model.generate(**inputs, **{"do_sample": False, **options})[0]
    prompt = inputs["input_ids"].shape[1]
    whole, before = tokenizer.decode(out, skip_special_tokens=True), tokenizer.decode(out[:prompt], skip_special_tokens=True)
    return out[prompt:].tolist(), whole[len(before) :]


# ---- what it answers ----


def test_greedy_stories_are_transformers(trained_llama, stories, storyteller):
    ours = storyteller if trained_llama == stories else Generator(str(trained_llama), dtype="float32")
    answers = ours.generate(STORIES, max_new_tokens=NEW)
    hf = reference(trained_llama)
    want = [hf_generate(hf, text, max_new_tokens=NEW) for text in STORIES]
    assert [answer.tokens for answer in answers] == [ids for ids, _ in want]
    assert [answer.text for answer in answers] == [text for _, text in want]
    assert [answer.finish_reason for answer in answers] == ["length" if len(ids) == NEW else "stop" for ids, _ in want]
    assert answers[0].finish_reason == "length"


def test_repetition_penalty_is_transformers(storyteller, hf):
    want = hf_generate(hf, STORIES[0], max_new_tokens=NEW, repetition_penalty=1.4)[0]
    assert want != hf_generate(hf, STORIES[0], max_new_tokens=NEW)[0]
    answers = storyteller.generate(STORIES, max_new_tokens=NEW, repetition_penalty=1.4)
    assert answers[0].tokens == want


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.1, "top_p": 0.95, "seed": 3}])
def test_an_answer_does_not_depend_on_its_batch(storyteller, settings):
    together = storyteller.generate(STORIES, max_new_tokens=NEW, **settings)
    apart = storyteller.generate(STORIES, max_new_tokens=NEW, batch_size=1, **settings)
    assert together == apart
    if settings["temperature"]:
        other = storyteller.generate(STORIES, max_new_tokens=NEW, **{**settings, "seed": 4})
        assert [answer.tokens for answer in other] != [answer.tokens for answer in together]
        twice = storyteller.generate([STORIES[0], STORIES[0], STORIES[1]], max_new_tokens=NEW, **settings)
        assert twice[0] == together[0] and twice[0].tokens != twice[1].tokens


def test_prompts_as_text_and_as_ids(storyteller):
    ids = storyteller.tokenizer(STORIES[0])["input_ids"]
    one, other, _ = storyteller.generate([STORIES[0], ids, STORIES[1]], max_new_tokens=NEW)
    assert one == other and one.prompt_tokens == len(ids)


def test_messages_go_through_the_chat_template(stories):
    storyteller = Generator(str(stories), dtype="float32")
    storyteller.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "Once upon"}, {"role": "assistant", "content": " a time"}]
    assert storyteller.encode(messages) == storyteller.tokenizer("Once upon a time")["input_ids"]


def test_logprobs_are_the_models_own(storyteller, hf):
    answer = storyteller.generate(STORIES, max_new_tokens=NEW, temperature=0.7, top_k=3, logprobs=True)[0]
    ids = storyteller.encode(STORIES[0]) + answer.tokens
    want = torch.log_softmax(torch.tensor(hf_logits(hf[0], np.array([ids]))[0]), -1)
    start = answer.prompt_tokens
    np.testing.assert_allclose(answer.logprobs, [want[start - 1 + i, t] for i, t in enumerate(answer.tokens)], atol=1e-4)


def test_eight_devices_answer_as_one(stories, storyteller):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = Generator(str(stories), dtype="float32", mesh=mesh)
    assert any(not leaf.sharding.is_fully_replicated for leaf in spread.params.values())
    settings = {"max_new_tokens": NEW, "temperature": 0.8, "seed": 1}
    want = storyteller.generate(STORIES, **settings)
    assert [answer.tokens for answer in spread.generate(STORIES, **settings)] == [answer.tokens for answer in want]
    got, want = (g.score(STORIES, [" they"] * 3) for g in (spread, storyteller))
    np.testing.assert_allclose([s.logprobs for s in got], [s.logprobs for s in want], atol=1e-4)


def test_parameters_of_a_model_in_training(stories, storyteller):
    """`Generator.of` takes existing arrays, and other ones later."""
    model, params = load(stories)
    watched = Generator.of(model, params, storyteller.tokenizer, mesh=one_device(), dtype=jnp.float32, source=stories)
    assert watched.ends == storyteller.ends
    want = storyteller.generate(STORIES, max_new_tokens=NEW)
    assert watched.generate(STORIES, max_new_tokens=NEW) == want
    watched.params = jax.tree.map(lambda leaf: -leaf, params)
    assert watched.generate(STORIES, max_new_tokens=NEW) != want


def test_bfloat16(stories):
    low = Generator(str(stories), dtype="bfloat16")
    assert {leaf.dtype for leaf in low.params.values()} == {jnp.dtype("bfloat16")}
    assert len(low.generate(STORIES, max_new_tokens=10)[0].tokens) == 10


# ---- adapters ----


def test_an_adapter_answers_as_in_peft(tmp_path):
    base = tmp_path / "base"
    make_hf(Case("llama", "llama"), base)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear", modules_to_save=["lm_head"]),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    from generate.words import words

    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9)]
    answers = {}
    for merge in (True, False):
        ours = Generator(str(base), tmp_path / "adapter", dtype="float32", tokenizer=words(), merge=merge)
        assert any(spec.row.adapter for spec in ours.model.specs.values()) != merge
        ours.ends = frozenset()
        answers[merge] = [answer.tokens for answer in ours.generate(prompts, max_new_tokens=20)]

    def said(model) -> list[list[int]]:
        model.generation_config.eos_token_id, found = None, []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
            found.append(out[0, len(prompt) :].tolist())
        return found

    assert answers[True] == answers[False] == said(theirs) != said(AutoModelForCausalLM.from_pretrained(base))


# ---- when it stops ----


def test_stop_strings_cut_the_text(storyteller):
    whole = storyteller.generate(STORIES, max_new_tokens=NEW)
    for stop in (["."], ["ttle g", "was a"], [". One", "\n"], ["never there"]):
        answers = storyteller.generate(STORIES, max_new_tokens=NEW, stop=stop)
        assert any(s in full.text for s in stop for full in whole) == (stop != ["never there"])
        for answer, full in zip(answers, whole, strict=True):
            cut = min((full.text.index(s) for s in stop if s in full.text), default=None)
            assert answer.text == full.text[:cut]
            assert answer.finish_reason == (full.finish_reason if cut is None else "stop")
            assert answer.tokens == full.tokens[: len(answer.tokens)]
            if cut is not None:  # the last token is the one that completed the stop string
                shorter = storyteller.tokenizer.decode(answer.tokens[:-1])
                assert not any(s in shorter for s in stop)


def test_any_of_several_ends_stops(storyteller, hf, full_stop, monkeypatch):
    want, _ = hf_generate(hf, STORIES[0], max_new_tokens=NEW, eos_token_id=[full_stop, 2])
    monkeypatch.setattr(storyteller, "ends", frozenset({full_stop, 2}))
    one, long, _ = storyteller.generate(STORIES, max_new_tokens=NEW)
    assert one.tokens == want and want[-1] == full_stop and one.finish_reason == "stop"
    assert one.text == storyteller.tokenizer.decode(want[:-1])
    assert len(long.tokens) != len(one.tokens)  # rows stop by themselves


def test_the_loop_stops_when_all_rows_have(storyteller, full_stop, monkeypatch):
    """On the device: what was chosen behind the last row's end is nothing."""
    monkeypatch.setattr(storyteller, "ends", frozenset({full_stop}))
    steps, decode = [], PagedBatch.decode

    def watched(*arguments):
        places, seen = decode(*arguments)
        steps.append(int(seen.counts.max()))
        return places, seen

    monkeypatch.setattr(PagedBatch, "decode", watched)
    answers = storyteller.generate(STORIES, max_new_tokens=NEW)
    assert 1 + sum(steps) == max(len(answer.tokens) for answer in answers) < NEW


def test_ends_are_gathered(tmp_path, stories):
    """generation_config.json's list comes before config.json's id; the tokenizer's EOS and the end of a turn are added."""
    from generate.words import words

    make_hf(Case("llama", "llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert Generator(str(tmp_path), tokenizer=words()).ends == {5, 6}
    chat = words(eos_token="t7")
    chat.add_special_tokens({"additional_special_tokens": ["t9"]})
    chat.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} t9\n{% endfor %}"
    assert Generator(str(tmp_path), tokenizer=chat).ends == {5, 6, 7, 9}
    (tmp_path / "generation_config.json").unlink()
    assert Generator(str(tmp_path), tokenizer=words()).ends == {2}


# ---- what it refuses ----


def test_a_prompt_that_does_not_fit(storyteller):
    with pytest.raises(UserError, match=r"prompt 2 has 512 tokens.*context is 512"):
        storyteller.generate([STORIES[0], [5] * 512])


def test_answers_end_with_the_context(storyteller, caplog):
    with caplog.at_level(logging.WARNING, logger=session.__name__):
        long, short = storyteller.generate([[1] + [300] * 507, STORIES[0]], max_new_tokens=10)
    assert (len(long.tokens), len(short.tokens), long.finish_reason) == (4, 10, "length")
    assert "512 tokens together" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "settings", "says"),
    [
        ([[]], {}, "prompt 1 is empty"),
        ([[5, 512]], {}, "token 512, and the model's are 0 to 511"),
        (["a"], {"max_new_tokens": 0}, "at least 1"),
        (["a"], {"top_p": 2.0}, "top_p"),
        ([[{"role": "user", "content": "hi"}]], {}, "chat template"),
    ],
)
def test_refused(storyteller, prompts, settings, says):
    with pytest.raises(UserError, match=says):
        storyteller.generate(prompts, **settings)


def test_no_prompts_no_answers(storyteller):
    assert storyteller.generate([]) == []


def test_unknown_dtype(stories):
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        Generator(str(stories), dtype="fp8")


def test_other_prompts_compile_nothing(storyteller, lowered):
    """Prompts, answers and batches of other sizes in the same buckets reuse the programs, to generate and to score."""
    storyteller.generate(STORIES, max_new_tokens=NEW)
    storyteller.score(["Once upon a time", "Tom"], [" there was a cat", " ran to the park"])
    first = lowered()
    storyteller.generate(["Lily and her dad went to the big park. They saw", "Tom and", "A cat"], max_new_tokens=NEW - 1)
    storyteller.score(["Once upon a day", "Once"], [" there was a dog", " ran to the tree"])
    assert lowered() == first
    jax.jit(lambda x: x + 1)(1)  # the counter works
    assert lowered() > first
