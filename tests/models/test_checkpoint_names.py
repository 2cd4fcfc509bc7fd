"""Tests checkpoints whose tensor names differ from transformers' modules: they load, or the error names what is missing."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import CASES
from oracle import load, logits, make_hf, one_device, tokens
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from ftjax.config import MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import make_mesh
from ftjax.models.facts import read_config

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biases", "gpt-neox-serial"])
def test_model_without_a_head(name, tmp_path):
    """`GPT2Model.save_pretrained` writes `h.0...`, like the Hub's gpt2; GPT2LMHeadModel has `transformer.h.0...`."""
    hf = make_hf(BY_NAME[name], tmp_path / "whole")
    hf.base_model.save_pretrained(tmp_path / "base")
    assert not any(key.startswith(hf.base_model_prefix) for key in load_file(tmp_path / "base" / "model.safetensors"))
    ids = tokens(1, 9)
    want = logits(*load(tmp_path / "whole"), ids)
    np.testing.assert_array_equal(logits(*load(tmp_path / "base"), ids), want)


def test_a_missing_head_is_missing(tmp_path):
    """An untied model needs its head; transformers would initialise it at random."""
    make_hf(BY_NAME["gpt2-untied"], tmp_path).base_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "add"),
    [
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.0.attn.masked_bias": ()}),
        ("gpt-neox", {
            "gpt_neox.layers.0.attention.bias": (1, 1, 8, 8), "gpt_neox.layers.0.attention.masked_bias": (),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (4,),
        }),
        ("mistral", {"model.layers.0.self_attn.rotary_emb.inv_freq": (6,)}),
    ],
)  # fmt: skip
def test_tables_of_older_exports_are_passed_by(name, add, tmp_path):
    make_hf(BY_NAME[name], tmp_path)
    ids = tokens(1, 9)
    want = logits(*load(tmp_path), ids)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {key: np.zeros(shape, np.float32) for key, shape in add.items()}, file)
    np.testing.assert_array_equal(logits(*load(tmp_path), ids), want)
    save_file(load_file(file) | {f"{next(iter(add))}_too": np.zeros(3, np.float32)}, file)
    with pytest.raises(UserError, match="not part of this model"):
        load(tmp_path)


def test_the_head_of_gpt_neox_has_two_names(tmp_path):
    """transformers 4 calls it `embed_out`, transformers 5 `lm_head`."""
    make_hf(BY_NAME["gpt-neox"], tmp_path)
    ids = tokens(1, 9)
    want = logits(*load(tmp_path), ids)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "embed_out.weight" in tensors  # the name it writes, for older versions
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, file)
    np.testing.assert_array_equal(logits(*load(tmp_path), ids), want)


@pytest.mark.parametrize("embedding", ["model.embeddings", "backbone.embedding"])
def test_nemotron_h_has_three_sets_of_names(embedding, tmp_path):
    """Published files begin with `backbone.`; in memory transformers has `model.`, and some releases wrote
    `backbone.embedding`."""
    hf = make_hf(BY_NAME["nemotron-h"], tmp_path / "published")
    stored = load_file(tmp_path / "published" / "model.safetensors")
    assert "backbone.embeddings.weight" in stored
    hf.save_pretrained(tmp_path / "other", save_original_format=not embedding.startswith("model."))
    if not embedding.startswith("model."):
        stored[f"{embedding}.weight"] = stored.pop("backbone.embeddings.weight")
        save_file(stored, tmp_path / "other" / "model.safetensors")
    assert f"{embedding}.weight" in load_file(tmp_path / "other" / "model.safetensors")
    ids = tokens(1, 9)
    np.testing.assert_array_equal(logits(*load(tmp_path / "other"), ids), logits(*load(tmp_path / "published"), ids))


def test_joined_convolutions_of_olmo_hybrid(tmp_path):
    """transformers has the three convolutions as one in memory, whose parts may differ in size; in shards too."""
    case = dataclasses.replace(BY_NAME["olmo-hybrid"], values={**BY_NAME["olmo-hybrid"].values, "linear_value_head_dim": 10})
    make_hf(case, tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    whole = stored["model.layers.0.linear_attn.conv1d.weight"]
    assert len(whole) == 2 * 2 * 12 + 4 * 10
    for mesh in (one_device(), make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        model, params = load(tmp_path, mesh=mesh)
        own = {piece.name: params[spec.path][piece.index] for spec in model.specs.values() for piece in spec.pieces()}
        parts = [own[f"model.layers.0.linear_attn.{part}_conv1d.weight"] for part in "qkv"]
        assert [len(part) for part in parts] == [24, 24, 40]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", ["qwen3.5-images", "qwen3.5-moe-images"])
def test_text_saved_from_a_composite(name, tmp_path):
    """transformers' text class writes the names of the file that it was loaded from, with the text's config.json."""
    # The text's own config.json does not say that the whole model ties its output, and the class makes a new one.
    values = {**BY_NAME[name].values, "tie_word_embeddings": False}
    make_hf(dataclasses.replace(BY_NAME[name], values=values), tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "text")
    assert "model.language_model.norm.weight" in load_file(tmp_path / "text" / "model.safetensors")
    assert read_config(tmp_path / "text")["model_type"].endswith("_text")
    ids = tokens(1, 9)
    np.testing.assert_array_equal(logits(*load(tmp_path / "text"), ids), logits(*load(tmp_path / "whole"), ids))


def test_no_position_past_the_table_is_another_position(tmp_path):
    make_hf(BY_NAME["gpt2"], tmp_path)
    model, params = load(tmp_path)
    assert model.max_positions == 64
    assert np.isfinite(logits(model, params, tokens(1, 64))).all()
    assert np.isnan(logits(model, params, tokens(1, 65))[:, 64]).all()


def test_dropout_of_a_checkpoint_is_noted(tmp_path):
    make_hf(BY_NAME["gpt2"], tmp_path)
    (note,) = load(tmp_path)[0].notes
    assert "attn_pdrop = 0.1, resid_pdrop = 0.1, embd_pdrop = 0.1" in note
    make_hf(BY_NAME["llama"], tmp_path / "llama")
    assert load(tmp_path / "llama")[0].notes == ()
