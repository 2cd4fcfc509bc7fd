"""Tests what only Gemma 4 has: tensors that nobody reads, scalars in the model's dtype, and a second table of tokens."""

import json

import ml_dtypes
import numpy as np
import pytest
from cases import CASES
from oracle import attach_full, load, load_hf, make_hf
from safetensors.numpy import load_file, save_file

from ftjax.config import FullConfig, ModelConfig
from ftjax.errors import UserError
from ftjax.hub.load import open_model
from ftjax.hub.model_folder import from_params, model_tensors, write_folder
from ftjax.hub.vocabulary import with_new_tokens
from ftjax.models.model import build_module

WHOLE = next(case for case in CASES if case.name == "gemma4-images-and-sound")
TEXT = next(case for case in CASES if case.name == "gemma4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a bfloat16 checkpoint that also has keys and values of layers that share those of others, as published."""
    folder = tmp_path_factory.mktemp("hf")
    make_hf(WHOLE, folder).bfloat16().save_pretrained(folder)
    file = folder / "model.safetensors"
    more = {
        f"model.language_model.layers.{layer}.self_attn.{name}.weight": np.full(shape, layer, ml_dtypes.bfloat16)
        for layer in (4, 6)
        for name, shape in {"k_proj": (16, 32), "v_proj": (16, 32), "k_norm": (8,)}.items()
    }
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    return folder


def test_tensors_that_nobody_reads_are_carried(folder, tmp_path):
    """Every tensor comes back with its name, dtype and bits, scalars of layers among them."""
    model, params = load(folder, dtype=ml_dtypes.bfloat16)
    assert all(value.dtype == ml_dtypes.bfloat16 for value in params.values())
    tensors = model_tensors(model, from_params(params), params, FullConfig(), ml_dtypes.bfloat16)
    write_folder(tmp_path, model, tensors, "bfloat16", folder)
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path))
    assert {name: (t.dtype, t.tobytes()) for name, t in before.items()} == {
        name: (t.dtype, t.tobytes()) for name, t in after.items()
    }
    assert before["model.language_model.layers.0.layer_scalar"].dtype == ml_dtypes.bfloat16


def test_new_rows_of_both_tables(tmp_path):
    """The table for the inputs of the layers grows with the vocabulary, as transformers' does."""
    make_hf(WHOLE, tmp_path)
    config, source = open_model(tmp_path)
    config, source = with_new_tokens(ModelConfig(path=str(tmp_path), pad_vocab_to_multiple_of=64), config, source)
    text = config["text_config"]
    assert text["vocab_size"] == text["vocab_size_per_layer_input"] == 128
    assert source.shape("model.language_model.embed_tokens_per_layer.weight") == (128, 64)
    assert build_module(config).sizes.vocab == 128
    hf = load_hf(tmp_path)
    hf.resize_token_embeddings(128, mean_resizing=False)
    assert hf.model.language_model.embed_tokens_per_layer.weight.shape == (128, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_kv_shared_layers": 6}, "must have one of each layer type"),
        ({"use_bidirectional_attention": "all"}, "encoder"),
        ({"per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 24}}}, "full_attention layers several sizes"),
        ({"per_layer_config": {"1": {"intermediate_size": 16}}}, "intermediate_size in per_layer_config"),
    ],
)
def test_what_the_family_cannot_express_is_refused(values, message, tmp_path):
    make_hf(TEXT, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_scalars_do_not_train(tmp_path):
    make_hf(TEXT, tmp_path)
    model, _ = load(tmp_path, attach_full)
    assert not any("layer_scalar" in path for path in model.trainable)
    assert any("layer_scalar" in path for path in model.frozen)
