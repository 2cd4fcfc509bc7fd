"""Tests new tokens: their rows in the embeddings, what trains them, and which tools load the result."""

import json

import numpy as np
import pytest
import torch
from oracle import ONE, Case, hf_logits, logits, make_hf, one_device, tokens
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file
from tiny_run import make_config
from tiny_tokenizer import make_tokenizer, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftjax.config import Config, ModelConfig
from ftjax.errors import UserError
from ftjax.generate.load import load as load_for_use
from ftjax.hub.export import export
from ftjax.hub.load import load_base, open_model
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.vocabulary import with_new_tokens
from ftjax.models.model import Model, build_module
from ftjax.train.run import train
from ftjax.train.setup import prepare

SIZE = len(make_tokenizer())
CASES = {
    "llama": Case("llama", "llama", {"vocab_size": SIZE}),
    "tied": Case("tied", "llama", {"vocab_size": SIZE, "tie_word_embeddings": True}),
    "gpt2": Case("gpt2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": SIZE, "n_positions": 64}),
    "neox": Case("neox", "gpt_neox", {"vocab_size": SIZE}),  # checkpoints call its output embed_out
    "wide": Case("wide", "llama", {"vocab_size": SIZE + 8}),
}
NEW = {"add_special_tokens": ["<call>", "</call>"], "add_tokens": ["kilogram"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name)
            make_hf(CASES[name], folder)
            save_tokenizer(folder)
            rows = [json.dumps({"prompt": f"<call>{c}</call>", "completion": f"kilogram {c}"}) for c in "abcdefgh"]
            (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
        return made[name]

    return of


def fresh(folder, rows=None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "neox"])
def test_rows_are_those_of_transformers(bases, name):
    """New rows are the mean, as in transformers but for noise of 1e-9 of the covariance; a part of the rows can be made
    alone."""
    folder = bases(name)
    facts, source = with_new_tokens(ModelConfig(path=str(folder), **NEW), *open_model(folder))
    assert facts["vocab_size"] == SIZE + 3
    model = Model.of(build_module(facts), facts)
    params = load_base(model, source, one_device(), np.float32, str(folder))
    theirs = fresh(folder)
    torch.manual_seed(0)
    theirs.resize_token_embeddings(SIZE + 3, mean_resizing=True)
    ids = np.concatenate([tokens(1, 12, SIZE), [[SIZE, SIZE + 1, SIZE + 2]]], axis=1).astype(np.int32)
    np.testing.assert_allclose(logits(model, params, ids), hf_logits(theirs, ids), atol=2e-3, rtol=0)
    for key in source.keys():
        whole = source.read(key)
        assert whole.shape == source.shape(key)
        if whole.shape[0] == SIZE + 3:
            for start, stop in ((0, 5), (SIZE - 2, SIZE + 1), (SIZE + 1, SIZE + 3)):
                np.testing.assert_array_equal(source.read(key, (slice(start, stop), slice(1, 7))), whole[start:stop, 1:7])
            old = whole[:SIZE].mean(0, dtype=np.float64)
            np.testing.assert_allclose(whole[SIZE:], np.tile(old, (3, 1)), atol=1e-6)


def test_room_that_is_there_is_used(bases):
    facts, source = with_new_tokens(ModelConfig(path=str(bases("wide")), **NEW), *open_model(bases("wide")))
    assert facts["vocab_size"] == SIZE + 8
    whole = source.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(whole, open_model(bases("wide"))[1].read("model.embed_tokens.weight"))


def test_tokenizer(bases):
    tokenizer = load_tokenizer(ModelConfig(path=str(bases("llama")), **NEW))
    ids = tokenizer("<call>a kilogram</call>").input_ids
    assert len(ids) == 1 + 1 + 2 + 1 + 1 and max(ids) == SIZE + 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a kilogram"


def run_config(folder, out, method, **model) -> Config:
    return Config.model_validate({
        "model": {"path": str(folder), "dtype": "float32", "compute_dtype": "float32", **NEW, **model},
        "method": method,
        "data": {"train": str(folder / "train.jsonl"), "max_length": 32},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"max_steps": 3, "global_batch_size": 2, "report_to": []},
        "mesh": {"fsdp": 1}, "output_dir": str(out),
    })  # fmt: skip


def ours(base, adapter=None, merge=False):
    loaded = load_for_use(str(base), adapter, one_device(), np.float32, merge=merge)
    return logits(loaded.model, loaded.params, probe())


def probe():
    ids = tokens(2, 20, SIZE + 3)
    ids[0, :3] = SIZE, SIZE + 1, SIZE + 2
    return ids


def test_full(bases, tmp_path):
    """A run over a tied model; transformers loads weights, sizes and tokenizer."""
    method = {"name": "full", "train": ["embed_tokens"]}
    train(run_config(bases("tied"), tmp_path, method, pad_vocab_to_multiple_of=64), devices=ONE)
    theirs, tokenizer = fresh(tmp_path / "final"), AutoTokenizer.from_pretrained(tmp_path / "final")
    assert theirs.config.vocab_size == theirs.get_input_embeddings().weight.shape[0] == 128
    assert tokenizer("<call>").input_ids[-1] < 128 and tokenizer("kilogram").input_ids[-1] == SIZE
    np.testing.assert_allclose(ours(tmp_path / "final"), hf_logits(theirs, probe()), atol=1e-4, rtol=0)
    moved = theirs.get_input_embeddings().weight.detach().numpy()
    assert np.abs(moved[SIZE : SIZE + 3] - moved[SIZE + 3]).max() > 1e-3, "new tokens have been told apart"
    assert not list(tmp_path.glob("final/adapter*"))


def test_lora(bases, tmp_path):
    """The adapter holds both embeddings; PEFT loads it on the resized base, and the merged folder needs nothing."""
    method = {"name": "lora", "r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    train(run_config(bases("llama"), tmp_path / "run", method), devices=ONE)
    final = tmp_path / "run" / "final"
    want = hf_logits(PeftModel.from_pretrained(fresh(bases("llama"), SIZE + 3), final), probe())
    for merge in (False, True):
        np.testing.assert_allclose(ours(bases("llama"), final, merge), want, atol=1e-4, rtol=0)
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    merged = fresh(tmp_path / "merged")
    assert merged.config.vocab_size == SIZE + 3
    np.testing.assert_allclose(hf_logits(merged, probe()), want, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("</call>").input_ids[-1] == SIZE + 2
    assert f"resize_token_embeddings({SIZE + 3}" in (final / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_rows_of_the_new_tokens(bases, name, tmp_path):
    """Only these train and are saved, on both sides of a tied model; padding beyond them stays. PEFT and merging agree."""
    ids = list(range(SIZE, SIZE + 3))
    rows = ids if name == "tied" else {"embed_tokens": ids, "lm_head": ids}
    method = {"name": "lora", "r": 2, "target_modules": ["q_proj"], "trainable_token_indices": rows}
    train(run_config(bases(name), tmp_path / "run", method, pad_vocab_to_multiple_of=64), devices=ONE)
    final = tmp_path / "run" / "final"
    saved = {key: value for key, value in load_file(final / "adapter_model.safetensors").items() if "lora_" not in key}
    assert len(saved) == (1 if name == "tied" else 2)
    assert all(value.shape == (3, 32) and np.abs(value[0] - value[1]).max() > 1e-3 for value in saved.values())
    want = hf_logits(PeftModel.from_pretrained(fresh(bases(name), 128), final), probe())[..., : SIZE + 3]
    for merge in (False, True):
        np.testing.assert_allclose(ours(bases(name), final, merge), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_embeddings_that_peft_saves_unasked(bases, name, tmp_path):
    """After resizing, PEFT saves the embeddings with the adapter, for a tied model both."""
    base = fresh(bases(name), SIZE + 3)
    theirs = get_peft_model(base, PeftLoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 if parameter.requires_grad else 0)
        base.get_input_embeddings().weight[SIZE:] += torch.randn(3, 32)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    np.testing.assert_allclose(ours(bases(name), tmp_path), hf_logits(theirs, probe()), atol=1e-4, rtol=0)


def test_refused(bases):
    def made(name, method, mesh=None, **model):
        config = make_config(bases(name), method=method, mesh=mesh or {"fsdp": 8})
        return prepare(config.model_copy(update={"model": config.model.model_copy(update={**NEW, **model})}))

    ids = rf"\[{SIZE}, {SIZE + 1}, {SIZE + 2}\]"
    both = rf"{{lm_head: {ids}, embed_tokens: {ids}}}, or method.modules_to_save: \[lm_head, embed_tokens\]"
    with pytest.raises(UserError, match=f"3 new rows.*trainable_token_indices: {both}"):
        made("llama", {"name": "lora", "r": 2})
    with pytest.raises(UserError, match=f"model.embed_tokens get 3 new rows.*trainable_token_indices: {ids}$"):
        made("tied", {"name": "lora", "r": 2, "trainable_token_indices": [SIZE, SIZE + 1, 4]})
    with pytest.raises(UserError, match=r"method\.train: \[embed_tokens\]"):
        made("tied", {"name": "full", "last_layers": 1})
    mesh = {"fsdp": 2, "tensor": 4}
    size = SIZE + 1 if (SIZE + 1) % 4 else SIZE + 2
    words = {"add_special_tokens": ["<call>", "</call>"][: size - SIZE], "add_tokens": []}
    says = rf"embed_tokens.*{size}.*pad_vocab_to_multiple_of: 4, which makes it {size + -size % 4}"
    with pytest.raises(UserError, match=says):
        made("tied", {"name": "full"}, mesh, **words)
    setup = made("tied", {"name": "full"}, mesh, pad_vocab_to_multiple_of=4, **words)
    assert setup.model.config["vocab_size"] == size + -size % 4
