"""Tests routed experts in int8 and nf4: products, every way to store them, meshes, memory, checkpoints in few bits, a run."""

import dataclasses
import json
from functools import partial

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

from ftjax.config import Config, MeshConfig
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
MESH = {"fsdp": 2, "expert": 2, "tensor": 2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return folders(CASES, tmp_path_factory)


@partial(jax.jit, static_argnames="contract")
def product_and_gradient(x, weight, sizes, d_y, contract):
    y, back = jax.vjp(lambda x: grouped(x, weight, sizes, contract), x)
    return y, back(d_y)[0]


@pytest.mark.parametrize("contract", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_grouped_product_is_that_of_dequantised_matrices(kind, contract):
    """Values and gradients are the same, and rows of no group are zero."""
    rng = np.random.default_rng(0)
    shape = (5, 24, 136) if contract == 2 else (5, 136, 24)
    weight = jax.jit(Quantization(kind, contract - 3).quantise)(rng.normal(size=shape).astype(np.float32))
    plain = jax.jit(lambda weight: weight.dequantise(jnp.float32))(weight)
    x, d_y = (rng.normal(size=(40, size)).astype(np.float32) for size in (136, 24))
    for sizes in ((7, 0, 20, 1, 5), (0, 0, 40, 0, 0), (0, 0, 0, 0, 0), (8, 8, 8, 8, 8)):
        got, want = (product_and_gradient(x, one, np.array(sizes, np.int32), d_y, contract) for one in (weight, plain))
        for mine, other in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, other, atol=5e-5, err_msg=str(sizes))
        assert not np.any(np.asarray(got[0])[sum(sizes) :])
        assert sum(sizes) == 0 or np.abs(got[0]).max() > 1


def bits(value) -> list:
    return jax.tree.leaves(value)


STORED = [(name, kind) for name in CASES for kind in KINDS if ALL or kind == ("int8" if name == "llama4" else "nf4")]


@pytest.mark.parametrize("name, kind", STORED)
def test_weights_and_logits(bases, name, kind):
    """Each expert has the bits that it has if quantised alone, also on a mesh; logits are those of what they stand for."""
    model, params = load(bases(name), quantised(kind))
    plain, exact = load(bases(name))
    stand, ids = dense(params), tokens(8, 12)
    for path in (path for path in params if ".experts." in path and "bias" not in path):
        quantise, weight = jax.jit(model.specs[path].row.quantization.quantise), np.asarray(exact[path])
        for mine, other in zip(bits(quantise(weight[1, 2])), bits(params[path]), strict=True):
            np.testing.assert_array_equal(mine, np.asarray(other)[1, 2], err_msg=path)
        assert np.abs(np.asarray(stand[path]) - weight).max() > 1e-3
    want = logits(plain, stand, ids)
    np.testing.assert_allclose(logits(model, params, ids), want, atol=3e-5, rtol=0)
    assert np.abs(want - logits(plain, exact, ids)).max() > 1e-3, "nothing was rounded, so nothing was tested"
    mesh = make_mesh(MeshConfig(**MESH))
    model, spread = load(bases(name), quantised(kind), mesh=mesh)
    for path, value in params.items():
        for mine, other in zip(bits(value), bits(spread[path]), strict=True):
            np.testing.assert_array_equal(mine, other, err_msg=path)

    def forward(params):
        module = model.bind(params)
        return module.unembed(module.hidden(jnp.asarray(ids), context(ids))[0], context(ids))

    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(forward)(spread), want, atol=5e-5, rtol=0)


ON_ATTENTION = {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ON_EXPERTS = {**ON_ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
RUNS = [  # weights in few bits, method, mesh; None is one device
    ("nf4", ON_EXPERTS, MESH),
    ("int8", ON_ATTENTION, None),
]
MORE = [
    ("int8", ON_ATTENTION, {"fsdp": 4, "expert": 2}),
    ("int8", ON_EXPERTS, {"data": 2, "fsdp": 1, "expert": 4}),
    ("nf4", ON_ATTENTION, {"fsdp": 4, "tensor": 2}),
    ("nf4", ON_EXPERTS, None),
]


@pytest.mark.parametrize("kind, method, mesh", [*RUNS, *(MORE if ALL else ())], ids=str)
def test_training_is_that_of_what_the_weights_stand_for(bases, kind, method, mesh):
    """Losses, gradients' norms and adapters agree after two steps, on one device and on several."""
    batches = [make_batch(8, 16, 96, seed) for seed in range(2)]
    config = make_config(bases("mixtral"), method=method, optimizer={"adam_epsilon": 1e-3})
    held = prepare(with_model(config, quantization=kind, remat="full"), ONE)
    plain = prepare(config, ONE)
    assert any(".experts." in path for path, leaf in held.frozen.items() if isinstance(leaf, Int8 | Nf4))
    plain.frozen, plain.params = dense(held.frozen), held.params
    if mesh:
        many = make_config(bases("mixtral"), method=method, optimizer={"adam_epsilon": 1e-3}, mesh=mesh)
        held = prepare(with_model(many, quantization=kind))
        codes = held.frozen["model.layers.block.mlp.experts.gate_up_proj"]
        codes = codes.values if kind == "int8" else codes.codes
        assert codes.addressable_shards[0].data.size == codes.size // 8, "it lies in eight parts"
    results = []
    for setup in (plain, held):
        metrics, params = run_steps(dataclasses.replace(setup, params=jax.tree.map(jnp.copy, setup.params)), batches)
        results.append(([float(v) for m in metrics for v in (m.loss, m.grad_norm)], params))
    [(want, weights), (got, params)] = results
    np.testing.assert_allclose(got, want, rtol=5e-5)
    for path, value in params.items():
        np.testing.assert_allclose(value, weights[path], atol=5e-5, err_msg=path)


def mixture(kind, experts: int, layers: int = 2):
    facts = complete_config({
        "model_type": "mixtral", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": experts,
        "num_experts_per_tok": 1,
    }, "here")  # fmt: skip
    return lora_model(facts, kind, target_modules=["q_proj"])


@pytest.mark.parametrize("kind, remat", [("int8", "none"), *[("nf4", "none"), ("int8", "full")] * ALL])
def test_experts_are_not_dequantised_together(kind, remat):
    """Experts and layers more need no memory: less than a twentieth of what their weights would take."""
    models = {sizes: mixture(kind, *sizes) for sizes in ((4, 2), (16, 6))}
    temp = {sizes: compiled_step(model, remat, 8, jnp.float32).temp_size_in_bytes for sizes, model in models.items()}
    weights = {
        sizes: sum(4 * spec.size for spec in model.frozen.values() if "experts" in spec.row.axes and spec.row.quantization)
        for sizes, model in models.items()
    }
    assert weights[16, 6] - weights[4, 2] > 30e6
    assert temp[16, 6] - temp[4, 2] < 0.05 * (weights[16, 6] - weights[4, 2])


def test_one_expert_is_read_at_a_time(bases, monkeypatch):
    sizes = sizes_read(monkeypatch)
    model, _ = load(bases("mixtral"), quantised("nf4"))
    spec = model.specs["model.layers.block.mlp.experts.gate_up_proj"]
    assert max(sizes) == spec.size // 8 and sizes.count(max(sizes)) == 8, "two layers of four experts"


# ---- checkpoints in few bits ----


def same_bits(folder, plain, kind="nf4"):
    """Assert that a checkpoint in few bits and one of what its weights stand for are quantised to the same bits."""
    got, want = (load(one, quantised(kind))[1] for one in (folder, plain))
    assert any(isinstance(value, Nf4 | Int8) and ".experts." in path for path, value in got.items())
    for path, value in want.items():
        for mine, other in zip(bits(got[path]), bits(value), strict=True):
            np.testing.assert_array_equal(mine, other, err_msg=path)


def test_fp8(bases, tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    config = json.loads((bases("mixtral") / "config.json").read_text())
    for folder in (plain, packed):
        folder.mkdir()
        how = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}} if folder == packed else {}
        (folder / "config.json").write_text(json.dumps(config | how))
    stand, held = {}, {}
    for name, value in load_torch(bases("mixtral") / "model.safetensors").items():
        stand[name] = held[name] = value
        if ".experts." in name:
            scale = torch.full((-(-value.shape[0] // 32), -(-value.shape[1] // 32)), 0.01)
            held[name] = (value / 0.01).to(torch.float8_e4m3fn)
            held[f"{name}_scale_inv"] = scale
            stand[name] = held[name].float() * 0.01
    save_file(held, packed / "model.safetensors")
    save_file(stand, plain / "model.safetensors")
    same_bits(packed, plain)


def test_mxfp4(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    make_hf(Case("gpt_oss", "gpt_oss", {**SMALL, "hidden_size": 64, "intermediate_size": 32, "head_dim": 8}), plain)
    packed.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    rng = np.random.default_rng(0)
    stand, held = {}, {}
    for name, value in load_torch(plain / "model.safetensors").items():
        stand[name] = held[name] = value
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            experts, inputs, outputs = value.shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(122, 126, (experts, outputs, inputs // 32), np.uint8)
            del held[name]
            held |= {f"{name}_blocks": torch.tensor(blocks), f"{name}_scales": torch.tensor(scales)}
            stand[name] = torch.tensor(dequantise(blocks, scales).astype(np.float32)).swapaxes(1, 2).contiguous()
    save_file(held, packed / "model.safetensors")
    save_file(stand, plain / "model.safetensors")
    same_bits(packed, plain)


# ---- a run ----


def test_a_run_is_merged_and_generates(tmp_path):
    """The merged model has the checkpoint's own experts, not rounded ones, with their updates."""
    from ftjax.generate.session import Generator
    from ftjax.hub.export import export

    base = tmp_path / "base"
    make_hf(CASES["mixtral"], base)
    save_tokenizer(base)
    words = [("abcdef" * 2)[i % 6 : i % 6 + 5] for i in range(16)]
    rows = [json.dumps({"prompt": word, "completion": word[::-1]}) for word in words]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    config = Config.model_validate({
        "model": {"path": str(base), "dtype": "float32", "compute_dtype": "float32", "quantization": "nf4"},
        "method": {**ON_EXPERTS, "target_modules": ["q_proj"]},
        "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 32},
        "optimizer": {"learning_rate": 1e-2}, "output_dir": str(tmp_path / "run"), "mesh": {"fsdp": 1},
        "training": {"max_steps": 3, "global_batch_size": 2, "save_steps": 3, "logging_steps": 1, "report_to": []},
    })  # fmt: skip
    train(config, devices=ONE)
    adapter = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert any(".experts." in name and np.abs(value).max() > 0 for name, value in adapter.items() if "lora_B" in name)
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    source, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert source.keys() == merged.keys()
    for name, value in source.items():
        if ".experts." in name:
            update = merged[name] - value
            spectrum = np.linalg.svd(update, compute_uv=False)
            assert spectrum[0] > 1e-4 and spectrum[4:].max() < 1e-2 * spectrum[0], f"{name}: an update of rank 4"
        elif "q_proj" not in name:
            np.testing.assert_array_equal(merged[name], value, err_msg=name)
    generator = Generator(str(base), tmp_path / "run" / "final", dtype="float32", quantization="nf4")
    assert sum(isinstance(leaf, Nf4) for path, leaf in generator.params.items() if ".experts." in path) == 2
    answer = generator.generate(["abc"], max_new_tokens=2)[0]
    model, params = load(base, quantised("nf4", config.method))
    from ftjax.hub.adapter.peft import load_adapter

    params |= load_adapter(model, tmp_path / "run" / "final", one_device())
    first = logits(model, params, np.array([generator.tokenizer("abc").input_ids], np.int32))[0, -1].argmax()
    assert answer.tokens[0] == int(first)
