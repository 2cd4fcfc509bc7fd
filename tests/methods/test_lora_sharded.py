"""Tests that LoRA on several devices gives the losses of one device."""

import numpy as np
import pytest
from oracle import ONE, Case, make_hf
from tiny_run import make_batch, make_config, run_steps

from ftjax.train.setup import prepare

VARIANTS = {
    "pissa, rows, biases": {
        "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa", "trainable_token_indices": [7, 90, 3],
        "bias": "lora_only", "layers_to_transform": [1],
    },
    "tied embedding": {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_hf(Case("llama", "llama", {"tie_word_embeddings": True, "attention_bias": True, "num_hidden_layers": 3}), folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_sharded_is_one_device(base, name):
    method = {"name": "lora", "r": 4, "lora_alpha": 8, **VARIANTS[name]}
    batches = [make_batch(8, 32, 96, seed) for seed in range(3)]
    found = []
    for mesh, devices in (({"fsdp": 4, "tensor": 2}, None), ({"fsdp": 1}, ONE)):
        setup = prepare(make_config(base, method=method, mesh=mesh), devices)
        assert setup.mesh.size == (8 if devices is None else 1)
        metrics, params = run_steps(setup, batches)
        found.append(([float(m.loss) for m in metrics], params))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    for path, value in found[0][1].items():
        np.testing.assert_allclose(value, found[1][1][path], atol=1e-4, err_msg=path)
    assert abs(found[0][0][2] - found[0][0][0]) > 1e-2, "nothing moved, so nothing was compared"
