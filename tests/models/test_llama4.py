"""Tests what only Llama 4 has: chunks and growing queries after virtual tokens, and a text model with its output in a whole."""

import json

import jax
import numpy as np
import pytest
from cases import CASES
from oracle import assert_cached_is_uncached, hf_logits, load, load_hf, logits, make_hf, one_device, tokens
from peft import PeftModel

from ftjax.config import LoraConfig, PrefixTuningConfig
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import start_adapter, write_adapter
from ftjax.methods import method_of

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["llama4", pytest.param("llama4-images", marks=pytest.mark.sweep)])
def test_virtual_tokens_count_in_chunks_and_positions(name, tmp_path):
    """A prefix of five tokens moves the borders of chunks of eight, in whole rows as over a cache, as in PEFT."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_hf(BY_NAME[name], base)
    config = PrefixTuningConfig(num_virtual_tokens=5)
    model, params = load(base, lambda root: method_of(config).attach(root, config))
    params |= start_adapter(model, params, config, one_device(), 0, lambda text: [])
    rng = np.random.default_rng(0)
    for path, spec in model.trainable.items():
        value = np.array(params[path]) + rng.normal(size=spec.shape).astype(np.float32) * 0.5
        params[path] = jax.device_put(value, params[path].sharding)
    adapter.mkdir()
    write_adapter(adapter, model, params, config, str(base))
    ids = tokens(2, 24)
    theirs = hf_logits(PeftModel.from_pretrained(load_hf(base), adapter), ids)[:, -24:]
    np.testing.assert_allclose(logits(model, params, ids), theirs, atol=1e-4, rtol=0)
    assert_cached_is_uncached(model, params, ids, ((11, 9), (2, 4), (11, 11)), 30, want=theirs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_chunk_size": None}, "number of tokens of a chunk"),
        ({"layer_types": ["sliding_attention"] * 5}, "expected chunked_attention or full_attention"),
        ({"no_rope_layers": [1, 1]}, "2 no_rope_layers for 5 layers"),
    ],
)
def test_what_the_family_cannot_express_is_refused(values, message, tmp_path):
    make_hf(BY_NAME["llama4"], tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_adapters_of_experts_are_refused(tmp_path):
    """PEFT would take the outputs of these experts for their inputs."""
    make_hf(BY_NAME["llama4"], tmp_path)
    config = LoraConfig(target_parameters=["experts.down_proj"])
    with pytest.raises(UserError, match="none that an adapter can update"):
        load(tmp_path, lambda root: method_of(config).attach(root, config))


def test_an_output_that_is_tied_in_one_place_only_is_refused(tmp_path):
    """transformers reads the field of the text model here, and in other composite models that of the whole."""
    make_hf(BY_NAME["llama4-images"], tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(UserError, match="give both the same value"):
        load(tmp_path)
