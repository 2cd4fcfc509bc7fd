"""Inference from Python: the answers of the classes below it, the embeddings of transformers, and what is refused."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import ftjax
from ftjax.generate.session import Generator

SAID = [{"role": "user", "content": "Tom has 3 "}]


@pytest.fixture(scope="module")
def model(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        return ftjax.load("runs/first")


def test_answers(model, made, monkeypatch):
    monkeypatch.chdir(made)
    generator = Generator("model", "runs/first/final", dtype="float32")
    prompts, settings = ["Tom has 3 ", "Tom has 5 "], {"max_new_tokens": 8, "temperature": 0.9, "seed": 3}
    want = [one.text for one in generator.generate(prompts, **settings)]
    assert model.generate(prompts, **settings) == want
    assert model.generate(prompts[0], **settings) == model.generate(SAID, **settings) == want[0]
    assert "".join(model.stream(prompts[0], **settings)) == want[0]
    sizes = [model.answer([prompts[0]], **how)[0].prompt_tokens for how in ({"raw": True}, {}, {"system": "Be kind."})]
    assert sizes == sorted(set(sizes))
    talk = model.chat(**settings)
    assert talk.say(prompts[0]) == want[0]
    assert [one["role"] for one in talk.messages] == ["user", "assistant"]
    assert talk.undo() == prompts[0] and talk.messages == []


def test_scores(model):
    one = model.score("Tom has 3 ", "dogs")
    assert model.score(["Tom", "Tom has 3 "], ["dog", "dogs"])[1].total == pytest.approx(one.total, abs=1e-5)
    assert len(one.logprobs) == 4 and one.total == sum(one.logprobs) < 0


def test_embeddings_are_those_of_transformers(model, made, monkeypatch):
    monkeypatch.chdir(made)
    base = ftjax.load("model")
    texts = ["Tom", "The dog ran to the park."]
    hf = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    for pooling in ("last", "mean"):
        found = base.embed(texts, pooling=pooling)
        for text, row in zip(texts, found, strict=True):
            with torch.no_grad():
                hidden = hf.model(torch.tensor([base.tokenizer(text)["input_ids"]])).last_hidden_state[0].numpy()
            np.testing.assert_allclose(row, hidden[-1] if pooling == "last" else hidden.mean(0), atol=2e-5)
    assert base.embed(texts[0]).shape == found[0].shape and found.dtype == np.float32
    assert not np.allclose(model.embed(texts), base.embed(texts), atol=1e-4)  # the adapter counts


def test_the_format_of_training_is_kept(home):
    """A run without the chat template answers texts without it."""
    from tiny_settings import SETTINGS

    data = {"train": "train.jsonl", "max_length": 64, "prompt_format": "raw"}
    run = ftjax.train({**SETTINGS, "data": data, "output_dir": "raw"}, devices=jax.devices(), quiet=True)
    model = run.model()
    plain = Generator("model", "raw/final", dtype="float32")
    text = "Tom has 3 "
    assert model.generate(text, max_new_tokens=5) == plain.generate([text], max_new_tokens=5, chat=False)[0].text
    want = plain.score([plain.encode(text, chat=False)], [[plain.tokenizer.convert_tokens_to_ids(x) for x in "dogs"]])[0]
    assert model.score(text, "dogs").total == pytest.approx(want.total, abs=1e-5)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda model: model.generate("Tom" * 99), "context"),
        (lambda model: model.generate("Tom", temperature=-1), "temperature"),
        (lambda model: model.generate("Tom", system="x", raw=True), "choose one"),
        (lambda model: model.generate("Tom", max_tokens=3), "no setting max_tokens; there are .*max_new_tokens"),
        (lambda model: model.chat(max_tokens=3), "no setting max_tokens"),
        (lambda model: model.generate(3), "expected a text, .* found int"),
        (lambda model: model.generate(SAID[0]), "expected a text, a list of messages, .* found dict"),
        (lambda model: model.generate(["Tom", None]), "prompt 2 is NoneType"),
        (lambda model: model.answer("Tom"), "a list of prompts"),
        (lambda model: model.embed("Tom", pooling="max"), "pooling = 'max'; expected one of last, mean"),
        (lambda model: ftjax.train("run.yaml", on_log=3), "on_log: expected a function"),
        (lambda model: model.score(["a", "b"], "c"), "2 prompts and one completion"),
        (lambda model: model.score(["a", "b"], ["c"]), "2 prompts and 1 completions"),
        (lambda model: ftjax.load("runs/nothing"), "no such run"),
        (lambda model: ftjax.load("runs/first", mesh={"sequence": 2}), "sequence"),
        (lambda model: ftjax.export("runs/first", "x", lora=True), "belongs to"),
        (lambda model: ftjax.plan({"model": {"path": "model"}, "data": {"train": "x"}}, "v99-3"), "v99"),
    ],
)
def test_mistakes_raise_user_error(model, home, call, said):
    with pytest.raises(ftjax.UserError, match=said):
        call(model)
