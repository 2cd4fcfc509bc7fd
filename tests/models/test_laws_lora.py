"""Tests LoRA on every family: PEFT loads the adapter, and the merged folder is the same model."""

import jax
import numpy as np
import pytest
from cases import CASES, FEW, ONE_OF_EACH
from oracle import hf_logits, load, load_hf, logits, make_hf, one_device, tokens, write_merged
from peft import PeftModel
from processes import ALL

from ftjax.config import LoraConfig
from ftjax.hub.adapter.peft import load_adapter, write_adapter
from ftjax.hub.load import init_params
from ftjax.methods import lora

# Experts and MLPs in turn: stacks of unlike layers.
MIXED = [case for case in CASES if case.name == "qwen3-moe-every-other" or (ALL and case.name.startswith("qwen3-moe-"))]

# One with other parts whose layers have other names, one whose other parts have layers of the same names, and one whose text
# stands with its output in the whole.
COMPOSITE = [case for case in ONE_OF_EACH if case.model_type in ("qwen3_5", "gemma3", "gemma4", "llama4")[: 4 if ALL else 2]]
TRIED = MIXED + (ONE_OF_EACH if ALL else FEW + COMPOSITE)


@pytest.mark.parametrize("case", TRIED, ids=str)
def test_adapter_and_merged_folder(case, tmp_path):
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    hf = make_hf(case, base)
    config = LoraConfig(r=4)
    model, params = load(base, lambda root: lora.attach(root, config))
    params |= init_params({path: spec for path, spec in model.specs.items() if spec.row.adapter}, one_device(), 0)
    rng = np.random.default_rng(0)
    for path, spec in model.trainable.items():  # B starts at zero, which would hide it
        # With updates twice as large, transformers' own logits of linear attention move by 1e-4 if weights move by half an ulp.
        value = np.array(params[path]) + rng.normal(size=spec.shape).astype(np.float32) * 0.1
        params[path] = jax.device_put(value, params[path].sharding)
    adapter.mkdir()
    write_adapter(adapter, model, params, config, str(base))
    ids = tokens(2, 20)
    got = logits(model, params, ids)
    theirs = PeftModel.from_pretrained(load_hf(base), adapter)
    np.testing.assert_allclose(got, hf_logits(theirs, ids), atol=1e-4, rtol=0)
    assert np.abs(got - hf_logits(hf, ids)).max() > 1e-2, "the adapter has no effect, so nothing was compared"
    again = load_adapter(model, adapter, one_device())
    for path, value in again.items():
        np.testing.assert_array_equal(value, params[path])
    merged.mkdir()
    write_merged(merged, model, params, config, base)
    np.testing.assert_allclose(got, hf_logits(load_hf(merged), ids), atol=1e-4, rtol=0)
