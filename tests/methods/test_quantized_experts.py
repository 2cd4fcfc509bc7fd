"""Tests routed experts in int8 and nf4: products, every way to store them, meshes, memory, checkpoints in few bits, a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import ONE, Case, context, folders, load, logits, make_hf, one_device, tokens
from processes import ALL
from quantised import KINDS, compiled_step, dense, lora_model, quantised, sizes_read, with_model
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from tiny_run import make_batch, make_config, run_steps
from tiny_tokenizer import save_tokenizer

from ftjax.config import Config, LoraConfig, MeshConfig
from ftjax.hub.packed.mxfp4 import dequantise
from ftjax.mesh import make_mesh
from ftjax.models.facts import complete_config
from ftjax.models.nn.grouped import grouped
from ftjax.models.nn.quantized import Int8, Nf4, Quantization
from ftjax.train.run import train
from ftjax.train.setup import prepare

SMALL = {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
CASES = {  # by how they store their experts
    # Sizes whose halves begin within a block: 160 / 2 = 80.
    "mixtral": Case("mixtral", "mixtral", {**SMALL, "intermediate_size": 160}),
    "gpt_oss": Case("gpt_oss", "gpt_oss", {**SMALL, "intermediate_size": 40, "sliding_window": 8}),
    "llama4": Case("llama4", "llama4_text", {
        **SMALL, "intermediate_size": 40, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "head_dim": 8,
        "num_experts_per_tok": 1, "attention_chunk_size": 8,
    }),
}  # fmt: skip
MESHES = [{"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"expert": 4, "fsdp": 1, "data": 2}]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return folders(CASES, tmp_path_factory)


@pytest.mark.parametrize("sizes", [(7, 0, 20, 1, 5), (0, 0, 40, 0, 0), (0, 0, 0, 0, 0), (8, 8, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("contract", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_grouped_product_is_that_of_dequantised_matrices(kind, contract, sizes):
    """Values and gradients are the same, and rows of no group are zero."""
    rng = np.random.default_rng(0)
    shape = (5, 24, 136) if contract == 2 else (5, 136, 24)
    weight = Quantization(kind, contract - 3).quantise(jnp.asarray(rng.normal(size=shape), jnp.float32))
    x, d_y = (jnp.asarray(rng.normal(size=(40, size)), jnp.float32) for size in (136, 24))

    @jax.jit
    def both(weight):
        y, back = jax.vjp(lambda x: grouped(x, weight, jnp.array(sizes, jnp.int32), contract), x)
        return y, back(d_y)[0]

    got, want = both(weight), both(weight.dequantise(jnp.float32))
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, other, atol=5e-5)
    assert not np.any(np.asarray(got[0])[sum(sizes) :])
    assert sum(sizes) == 0 or np.abs(got[0]).max() > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_weights_and_logits(bases, name, kind):
    """Each expert has the bits that it has if it is quantised alone, also on meshes; logits are those of what they stand for."""
    model, params = load(bases(name), quantised(kind))
    plain, exact = load(bases(name))
    stand, ids = dense(params), tokens(2, 20)
    for path in (path for path in params if ".experts." in path and "bias" not in path):
        how, weight = model.specs[path].row.quantization, exact[path]
        alone = how.quantise(weight[1, 2])
        for mine, other in zip(
            jax.tree.leaves(alone), jax.tree.leaves(jax.tree.map(lambda leaf: leaf[1, 2], params[path])), strict=True
        ):
            np.testing.assert_array_equal(mine, other)
        assert np.abs(stand[path] - weight).max() > 1e-3
    want = logits(plain, stand, ids)
    np.testing.assert_allclose(logits(model, params, ids), want, atol=3e-5, rtol=0)
    assert np.abs(want - logits(plain, exact, ids)).max() > 1e-3, "nothing was rounded, so nothing was tested"
    for sizes in MESHES if ALL or name == "mixtral" else MESHES[:1]:
        mesh = make_mesh(MeshConfig(**sizes))
        model, spread = load(bases(name), quantised(kind), mesh=mesh)
        for path, value in params.items():
            for mine, other in zip(jax.tree.leaves(value), jax.tree.leaves(spread[path]), strict=True):
                np.testing.assert_array_equal(mine, other, err_msg=path)
        wide = tokens(8, 20)
        with jax.set_mesh(mesh):
            got = np.asarray(
                jax.jit(lambda p, m=model: m.bind(p).unembed(m.bind(p).hidden(jnp.asarray(wide), context(wide))[0], context(wide)))(
                    spread
                )
            )
        np.testing.assert_allclose(got, logits(plain, stand, wide), atol=5e-5, rtol=0, err_msg=str(sizes))
