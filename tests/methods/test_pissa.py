"""Tests PiSSA against PEFT: initial values, what it trains, and the plain LoRA that it is saved as."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import Case, folders, hf_logits, load, logits, one_device, tokens, write_merged
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from ftjax.config import LoraConfig
from ftjax.hub.adapter.peft import attach_adapter, load_adapter, start_adapter, write_adapter
from ftjax.methods import lora
from ftjax.methods.pissa import principal

VARIANTS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"down_proj|mlp.c_proj": 2}, "alpha_pattern": {"q_proj|c_attn": 5}},
}
CASES = {
    "llama": Case("llama", "llama"),
    "gpt2": Case("gpt2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}  # GPT-2's weights are transposed


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return folders(CASES, tmp_path_factory)


def started(folder, config, dtype=jnp.float32):
    model, params = load(folder, lambda root: lora.attach(root, config), dtype=dtype)
    return model, params | start_adapter(model, params, config, one_device(), 0, lambda text: [])


def moved(model, params):
    """Add noise to what trains."""
    rng = np.random.default_rng(1)
    new = {}
    for path, spec in model.trainable.items():
        value = np.array(params[path])
        for piece in spec.pieces():
            value[piece.index] += rng.normal(size=piece.shape).astype(np.float32) * 0.1
        new[path] = jax.device_put(value, params[path].sharding)
    return {**params, **new}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_starts_from_the_base_to_the_last_bit(bases, dtype):
    """The start is the base bit for bit, even in bfloat16, where base minus singular values would be rounded again."""
    folder = bases("llama")
    model, params = started(folder, LoraConfig(init_lora_weights="pissa", target_modules=TARGETS["llama"]), dtype)
    plain, weights = load(folder, dtype=dtype)
    ids = tokens(2, 20)
    np.testing.assert_array_equal(logits(model, params, ids), logits(plain, weights, ids))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights", "ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize(("family", "name"), [*(("llama", name) for name in VARIANTS), ("gpt2", "patterns")])
def test_is_peft(bases, family, name, tmp_path):
    """From the same start and after the same change, PEFT's live model, whose base it changed, gives ftjax's logits; so does
    ftjax's folder on the untouched base, and it equals PEFT's conversion."""
    folder = bases(family)
    values = {"target_modules": TARGETS[family], "init_lora_weights": "pissa", **VARIANTS[name]}
    config = LoraConfig(**values)
    model, params = started(folder, config)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), PeftLoraConfig(task_type="CAUSAL_LM", **values)
    ).eval()
    theirs.peft_config["default"].init_lora_weights = True  # else the folder would be read back as a PiSSA
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    after = moved(model, params)
    held = dict(theirs.named_parameters())
    for path, spec in model.trainable.items():
        for piece in spec.pieces():
            weight = held[f"base_model.model.{piece.name}".replace(".weight", ".default.weight")]
            first, value = (np.asarray(found[path][piece.index]) for found in (params, after))
            # The sign of a singular vector is arbitrary; if PEFT's differs, so does its part of the trained weights.
            axis = spec.shape[-1] == first.shape[-1] and path.endswith("lora_A")
            sign = np.sign((weight.detach().numpy() * first).sum(axis=1 if axis else 0))
            sign = sign[:, None] if axis else sign[None]
            np.testing.assert_allclose(weight.detach().numpy(), first * sign, atol=1e-4, err_msg=piece.name)
            with torch.no_grad():
                weight.copy_(torch.tensor(value * sign))
    ids = tokens(2, 20)
    got = logits(model, after, ids)
    np.testing.assert_allclose(got, hf_logits(theirs, ids), atol=1e-4)
    assert np.abs(got - logits(model, params, ids)).max() > 1e-2, "nothing moved, so nothing was compared"
    assert sum(spec.size for spec in model.trainable.values()) == theirs.get_nb_trainable_parameters()[0]

    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", model, after, config, str(folder))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "ours")
    np.testing.assert_allclose(got, hf_logits(plain, ids), atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, converted = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in converted.items()}
    for key in (key for key in ours if "lora_A" in key):
        b, other = (found[key.replace("lora_A", "lora_B")] for found in (ours, converted))
        np.testing.assert_allclose(b @ ours[key], other @ converted[key], atol=1e-4, err_msg=key)
    said = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"):
        assert said[0][key] == pytest.approx(said[1][key]) if key == "lora_alpha" else said[0][key] == said[1][key], key

    again, read = load(folder, lambda root: attach_adapter(root, tmp_path / "ours"))
    read |= load_adapter(again, tmp_path / "ours", one_device())
    np.testing.assert_allclose(logits(again, read, ids), got, atol=1e-4)
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", model, after, config, folder)
    np.testing.assert_allclose(hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), got, atol=1e-4)


def test_subspace_iterations():
    """They find the subspace that torch finds, up to a thousandth, even if singular values fall slowly."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, 40)))[0] for size in (64, 48))
    weight = ((u * 0.9 ** np.arange(40)) @ v.T).astype(np.float32)
    best = np.linalg.norm(0.9 ** np.arange(4))

    def kept(niter):
        a, b = principal(weight, 4, 2.0, f"pissa_niter_{niter}", np.random.default_rng(1))
        assert a.shape == (4, 48) and b.shape == (64, 4)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-4)
        return np.linalg.norm(2 * b @ a) / best

    torch.manual_seed(0)
    theirs = np.linalg.norm(torch.svd_lowrank(torch.tensor(weight), 4, niter=16)[1]) / best
    assert 0.999 < kept(16) <= 1.00001 and abs(kept(16) - theirs) < 1e-3
    assert kept(1) < kept(16) - 0.01, "a single iteration falls short, so that what they do is seen"
