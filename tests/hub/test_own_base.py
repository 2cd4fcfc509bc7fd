"""Tests warnings about an adapter on a model that is not its base."""

import json

import jax.numpy as jnp
import pytest
from oracle import Case, load, make_hf, one_device
from tiny_tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM

from ftjax.config import LoraConfig
from ftjax.errors import UserError
from ftjax.generate.load import load as load_for_use
from ftjax.hub.adapter.own_base import FILE, write_base
from ftjax.hub.adapter.peft import write_adapter
from ftjax.hub.export import export
from ftjax.hub.load import init_params
from ftjax.methods import lora


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Write a model, an adapter with a digest of it, and one without."""
    home = tmp_path_factory.mktemp("home")
    make_hf(Case("llama", "llama"), home / "base")
    save_tokenizer(home / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model, params = load(home / "base", lambda root: lora.attach(root, config))
    params |= init_params({path: spec for path, spec in model.specs.items() if spec.row.adapter}, one_device(), 0)
    params["model.layers.block.self_attn.q_proj.lora_B"] += 0.3
    for name in ("adapter", "peft"):
        (home / name).mkdir()
        write_adapter(home / name, model, params, config, str(home / "base"))
    write_base(home / "adapter", home / "base")
    return home


def said(base, adapter, capsys):
    capsys.readouterr()
    load_for_use(str(base), adapter, one_device(), jnp.dtype(jnp.float32), merge=False)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def test_its_own(home, tmp_path, capsys):
    """The base is recognised under another name, in other shards, and rounded."""
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    for base in (home / "base", tmp_path / "shards", tmp_path / "half"):
        assert not said(base, home / "adapter", capsys)
    assert not said(home / "base", home / "peft", capsys)


def test_another_model(home, tmp_path, capsys):
    make_hf(Case("llama", "llama"), tmp_path / "other", seed=1)
    make_hf(Case("llama", "llama"), tmp_path / "base", seed=1)
    for base, named in ((tmp_path / "other", True), (tmp_path / "base", False)):
        (line,) = said(base, home / "adapter", capsys)
        assert "made on a model with other weights than" in line and (str(home / "base") in line) == named
    (line,) = said(tmp_path / "other", home / "peft", capsys)
    assert f"made on {home / 'base'}, and {tmp_path / 'other'} is given" in line


def test_a_model_that_has_it_already(home, tmp_path, capsys):
    export(home / "base", tmp_path / "base", adapter=home / "peft", merge=True)
    (line,) = said(tmp_path / "base", home / "adapter", capsys)
    assert "merged already" in line


def test_another_size(home, tmp_path):
    make_hf(Case("llama", "llama", {"hidden_size": 64}), tmp_path / "wide")
    with pytest.raises(UserError, match=rf"do not fit.*made on {home / 'base'}: is that the model"):
        load_for_use(str(tmp_path / "wide"), home / "peft", one_device(), jnp.dtype(jnp.float32))


def test_names_of_the_hub(home, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    for file in (home / "peft").iterdir():
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(path.read_text())
    for name, alike in (("someone/Base", True), ("someone/else", False), (None, True)):
        path.write_text(json.dumps({**saved, "base_model_name_or_path": name}))
        assert bool(said(home / "base", tmp_path / "adapter", capsys)) != alike


def test_a_digest_that_is_none(home, tmp_path, capsys):
    for file in (home / "peft").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(UserError, match="remove the file"):
        said(home / "base", tmp_path, capsys)
