"""Tests RoPE parameters in published folders that transformers ignores: they have no effect here either, and cause a note."""

import json

import numpy as np
import pytest
from oracle import Case, hf_logits, load, logits, make_hf, tokens
from transformers import AutoModelForCausalLM

from ftjax.errors import UserError

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
FIELDS = {
    "attn_factor": ("llama", {**YARN, "attn_factor": 0.5}),
    "finetuned": ("llama", {**YARN, "finetuned": True}),
    "mscale": ("llama", {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}),
    "short_mscale": ("phi3", {**LONG, "short_mscale": 2.0, "long_mscale": 3.0}),
    "mrope_section": ("qwen2", {"rope_type": "default", "mrope_section": [1, 1, 2]}),
}
READ = ("mscale", "mrope_section")  # for YaRN; for images, whose sections make no difference to a text


@pytest.mark.parametrize("name", FIELDS)
def test_as_transformers(name, tmp_path):
    kind, scaling = FIELDS[name]
    make_hf(Case(kind, kind), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    more = {"original_max_position_embeddings": 16} if kind == "phi3" else {}
    path.write_text(json.dumps({**values, **more, "rope_theta": 500.0, "rope_scaling": scaling}))
    ids = tokens(2, 24)
    model, params = load(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(logits(model, params, ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)
    assert any(name in note for note in model.notes) == (name not in READ)


def test_what_transformers_4_wrote_of_gpt_neox(tmp_path):
    """`rope_theta` and `partial_rotary_factor` are accepted next to the names that transformers reads, unless they differ."""
    make_hf(Case("gpt-neox", "gpt_neox"), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    values |= {"rotary_emb_base": 500, "rotary_pct": 0.5, "rope_theta": 500, "partial_rotary_factor": 0.5, "rope_scaling": None}
    path.write_text(json.dumps(values))
    ids = tokens(2, 24)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(logits(*load(tmp_path), ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)
    for name in ("rope_theta", "partial_rotary_factor"):
        path.write_text(json.dumps({**values, name: 0.25}))
        with pytest.raises(UserError, match=f"{name} = 0.25, but ftjax supports only .*: transformers reads rotary_"):
            load(tmp_path)


def test_what_transformers_4_wrote_of_granite_moe(tmp_path):
    make_hf(Case("granitemoe", "granitemoe"), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "position_embedding_type": "rope"}))
    load(tmp_path)
    path.write_text(json.dumps({**values, "position_embedding_type": "nope"}))
    with pytest.raises(UserError, match="position_embedding_type = 'nope', but ftjax supports only 'rope'"):
        load(tmp_path)
