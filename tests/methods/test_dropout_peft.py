"""Tests that LoRA and DoRA apply dropout in PEFT's places: with the same masks, logits and gradients are equal."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import Case, context, load, make_hf, one_device, tokens
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftjax.config import LoraConfig
from ftjax.hub.adapter.peft import start_adapter, write_adapter
from ftjax.methods import lora


def kept(shape) -> np.ndarray:
    """Return a mask determined by its shape, so that both sides use the same; about two thirds are true."""
    return (np.arange(math.prod(shape)) * 7919 % 1009 < 680).reshape(shape)


class SameMask(torch.nn.Dropout):
    def forward(self, x):
        return x * torch.tensor(kept(x.shape)) / (1 - self.p)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_where_peft_has_it(tmp_path, monkeypatch, dora):
    folder = tmp_path / "base"
    make_hf(Case("llama", "llama", {"attention_bias": True}), folder)
    values = {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.3, "use_dora": dora}
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="orthogonal", **values)
    model, params = load(folder, lambda root: lora.attach(root, config))
    params |= start_adapter(model, params, config, one_device(), 0, lambda text: [])
    rng = np.random.default_rng(0)
    for path in model.trainable:
        params[path] = params[path] + rng.normal(size=params[path].shape).astype(np.float32) * 0.2
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, params, config, str(folder))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter", is_trainable=True)
    for module in theirs.modules():
        for name, child in list(module.named_children()):
            if name == "lora_dropout":
                child["default"] = SameMask(0.3)
    theirs.train()
    ids = tokens(2, 12)
    want = theirs(input_ids=torch.tensor(ids).long()).logits
    (want**2).sum().backward()
    wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}

    monkeypatch.setattr("jax.random.bernoulli", lambda key, p, shape: jnp.asarray(kept(shape)))

    def forward(trained, dropout):
        ctx = context(ids, dropout=dropout)
        module = model.bind({**params, **trained})
        hidden, _, _ = module.hidden(jnp.asarray(ids), ctx)
        found = module.unembed(hidden, ctx)
        return jnp.sum(found**2), found

    trained = {path: params[path] for path in model.trainable}
    (_, got), gradients = jax.jit(jax.value_and_grad(forward, has_aux=True))(trained, jax.random.key(0))
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert np.abs(got - jax.jit(forward)(trained, None)[1]).max() > 0.1, "dropout has no effect, so nothing was compared"
    for path, spec in model.trainable.items():
        for piece in spec.pieces():
            name = f"base_model.model.{piece.name.removesuffix('.weight')}.default.weight"
            scale = np.abs(wanted[name]).max()
            np.testing.assert_allclose(gradients[path][piece.index] / scale, wanted[name] / scale, atol=1e-4, err_msg=name)
