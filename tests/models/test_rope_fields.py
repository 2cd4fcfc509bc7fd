"""RoPE's parameters that published folders have and transformers does not read: no effect here either, and a note."""

import json

import numpy as np
import pytest
from oracle import Case, hf_logits, load, logits, make_hf, tokens
from transformers import AutoModelForCausalLM

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
FIELDS = {
    "attn_factor": ("llama", {**YARN, "attn_factor": 0.5}),
    "finetuned": ("llama", {**YARN, "finetuned": True}),
    "mscale": ("llama", {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}),
    "short_mscale": ("phi3", {**LONG, "short_mscale": 2.0, "long_mscale": 3.0}),
    "mrope_section": ("qwen2", {"rope_type": "default", "mrope_section": [1, 1, 2]}),
}


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
    assert any(name in note for note in model.notes) == (name != "mscale")
