"""Tests LoRA on the weights of routed experts (`target_parameters`) against PEFT, in both directions and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import Case, context, hf_logits, load, logits, make_hf, one_device, tokens, write_merged
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from processes import ALL
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from ftjax.config import LoraConfig, MeshConfig
from ftjax.errors import UserError
from ftjax.flops import train_flops
from ftjax.hub.adapter.peft import attach_adapter, load_adapter, start_adapter, write_adapter
from ftjax.mesh import make_mesh
from ftjax.methods import lora
from ftjax.models.facts import read_config
from ftjax.models.model import Model, build_module

SMALL = {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
CASES = {
    "mixtral": Case("mixtral", "mixtral", SMALL),
    "qwen3_moe": Case("qwen3_moe", "qwen3_moe", {
        "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    }),
    "gpt_oss": Case("gpt_oss", "gpt_oss", {**SMALL, "intermediate_size": 16, "sliding_window": 8}),
    "gemma4": Case("gemma4", "gemma4_text", {
        "num_hidden_layers": 2, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
        "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
    }),
}  # fmt: skip
LOGITS = 1e-4  # absolute, float32: the router's weights make more of what is rounded differently
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
VARIANTS = {
    "both": {"target_parameters": BOTH, "target_modules": ["q_proj"], "r": 3, "lora_alpha": 6},
    "one": {"target_parameters": ["experts.down_proj"], "target_modules": [], "r": 2, "use_rslora": True},
    "patterns": {
        "target_parameters": BOTH, "target_modules": [], "rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 5},
        "alpha_pattern": {"mlp.experts.down_proj": 32},
    },
}  # fmt: skip

MESHES = {
    "mixtral": {"fsdp": 2, "expert": 2, "tensor": 2},
    "qwen3_moe": {"fsdp": 4, "expert": 2},
    "gpt_oss": {"fsdp": 4, "tensor": 2},
    "gemma4": {"fsdp": 2, "expert": 2, "tensor": 2},
}
# PEFT warns that it ignores patterns of parameters, and honours them.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make_hf(CASES[name], folder)
            made[name] = folder
        return made[name]

    return base


def fresh(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def ours(folder, values: dict, mesh=None, noise: float = 0.3):
    """Return ftjax's model with an adapter whose B matrices are not zero."""
    mesh = mesh or one_device()
    model, params = load(folder, lambda root: lora.attach(root, LoraConfig(**values)), mesh=mesh)
    new = start_adapter(model, params, LoraConfig(**values), mesh, 0, lambda text: [])
    rng = np.random.default_rng(0)
    for path, spec in model.trainable.items():
        start = np.array(new[path])
        for piece in spec.pieces():
            start[piece.index] += rng.normal(size=piece.shape).astype(np.float32) * noise
        new[path] = jax.device_put(start, new[path].sharding)
    return model, {**params, **new}


@pytest.mark.parametrize("name, variant", [*((name, "both") for name in CASES), ("mixtral", "one"), ("gpt_oss", "patterns")])
def test_peft_reads_what_we_write(bases, tmp_path, name, variant):
    """Logits with the adapter and merged are the same, and so are the names and shapes of the tensors."""
    folder, values, ids = bases(name), VARIANTS[variant], tokens(2, 12)
    model, params = ours(folder, values)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, params, LoraConfig(**values), str(folder))
    want = logits(model, params, ids)
    assert np.abs(want - hf_logits(fresh(folder), ids)).max() > 0.01
    theirs = PeftModel.from_pretrained(fresh(folder), tmp_path / "adapter")
    np.testing.assert_allclose(hf_logits(theirs, ids), want, atol=LOGITS, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("adapter", "theirs"))
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in other.items()}
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", model, params, LoraConfig(**values), folder)
    np.testing.assert_allclose(hf_logits(fresh(tmp_path / "merged"), ids), want, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("name, variant", [*((name, "both") for name in CASES), ("mixtral", "one"), ("gpt_oss", "patterns")])
def test_we_read_what_peft_writes(bases, tmp_path, name, variant):
    folder, ids = bases(name), tokens(2, 12)
    theirs = get_peft_model(fresh(folder), PeftLoraConfig(**VARIANTS[variant], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_" in key:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path)
    model, params = load(folder, lambda root: attach_adapter(root, tmp_path))
    params = {**params, **load_adapter(model, tmp_path, one_device())}
    np.testing.assert_allclose(logits(model, params, ids), hf_logits(theirs, ids), atol=LOGITS, rtol=0)


ONE = {"fsdp": 1}
PLACES = [(name, mesh) for name in CASES for mesh in (ONE, MESHES[name])] if ALL else [
    ("gpt_oss", ONE), ("mixtral", MESHES["mixtral"]),
]  # fmt: skip


@pytest.mark.parametrize("name, sizes", PLACES, ids=str)
def test_gradients(bases, tmp_path, name, sizes):
    """The gradients of A and B are PEFT's, on one device and on a mesh."""
    folder, values, ids = bases(name), VARIANTS["both"], tokens(4, 8)
    weights = np.random.default_rng(1).normal(size=(4, 8, 96)).astype(np.float32)
    mesh = one_device() if sizes is ONE else make_mesh(MeshConfig(**sizes))
    model, params = ours(folder, values, mesh)
    trained = {path: params[path] for path in model.trainable}

    def loss(trained):
        module, ctx = model.bind({**params, **trained}), context(ids)
        return jnp.sum(module.unembed(module.hidden(jnp.asarray(ids), ctx)[0], ctx) * weights)

    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.grad(loss))(trained)
    write_adapter(tmp_path, model, params, LoraConfig(**values), str(folder))
    theirs = PeftModel.from_pretrained(fresh(folder), tmp_path, is_trainable=True)
    (theirs(torch.tensor(ids).long()).logits * torch.tensor(weights)).sum().backward()
    wanted = {key.replace(".default", ""): value.grad for key, value in theirs.named_parameters() if "lora_" in key}
    write_adapter(tmp_path, model, {**params, **gradients}, LoraConfig(**values), str(folder))
    got = load_file(tmp_path / "adapter_model.safetensors")
    assert got.keys() == wanted.keys() and any("experts" in key for key in got)
    for key, value in got.items():
        want = wanted[key].numpy()
        np.testing.assert_allclose(value, want, atol=2e-4 * np.abs(want).max(), rtol=0, err_msg=key)


def test_only_active_experts_count(bases):
    """A token pays for the updates of the experts that it uses."""
    config = read_config(bases("mixtral"))

    def trained(values):
        root = build_module(config)
        lora.attach(root, LoraConfig(**values))
        return train_flops(Model.of(root, config)).trained

    one = trained({"target_parameters": BOTH, "target_modules": [], "r": 1})
    sizes = (config["hidden_size"] + 2 * config["intermediate_size"]) + (config["intermediate_size"] + config["hidden_size"])
    assert one == 2 * 2 * sizes  # two layers, two of four experts


@pytest.mark.parametrize(
    "values, said",
    [
        ({"target_parameters": ["mlp.experts.gate_proj"]},
         r"no weight of experts is named 'mlp.experts.gate_proj'; the model has mlp.experts.gate_up_proj, mlp.exp"),
        ({"target_parameters": BOTH, "lora_dropout": 0.1}, "target_parameters with lora_dropout"),
        ({"target_parameters": BOTH, "use_dora": True}, "PEFT has no DoRA of experts"),
        ({"target_parameters": BOTH, "init_lora_weights": "orthogonal"}, "experts start as true or gaussian"),
    ],
)  # fmt: skip
def test_mistakes(bases, values, said):
    with pytest.raises(UserError, match=said):
        load(bases("mixtral"), lambda root: lora.attach(root, LoraConfig(**values)))


def test_a_model_without_experts(tmp_path):
    make_hf(Case("llama", "llama"), tmp_path)
    with pytest.raises(UserError, match="names weights of routed experts, and this model has none"):
        load(tmp_path, lambda root: lora.attach(root, LoraConfig(target_parameters=BOTH)))


def test_gaussian_start(bases):
    values = {"target_parameters": BOTH, "target_modules": [], "init_lora_weights": "gaussian", "r": 4}
    model, params = load(bases("mixtral"), lambda root: lora.attach(root, LoraConfig(**values)))
    new = start_adapter(model, params, LoraConfig(**values), one_device(), 0, lambda text: [])
    for path, value in new.items():
        assert np.std(value) == pytest.approx(1 / 4 if path.endswith("lora_A") else 0, rel=0.1)


def test_the_adapter_is_taken_off(bases):
    """The reference model of preferences is the base model."""
    from ftjax.methods.walk import remove_adapters

    config = read_config(bases("gpt_oss"))
    root, plain = build_module(config), build_module(config)
    lora.attach(root, LoraConfig(**VARIANTS["both"]))
    remove_adapters(root)
    assert Model.of(root, config).specs.keys() == Model.of(plain, config).specs.keys()
