"""Tests routed experts: the balancing loss, both layouts of checkpoints, and routing on several devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, LIKE, UNLIKE
from oracle import Case, attach_full, context, hf_config, hf_logits, load, logits, make_hf, one_device, tokens, write_merged
from processes import ALL
from safetensors.numpy import load_file

from ftjax.config import FullConfig, MeshConfig
from ftjax.hub.load import open_model
from ftjax.hub.model_folder import from_source, model_tensors
from ftjax.mesh import make_mesh

# Families with a load-balancing loss in transformers.
WITH_LOSS = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "phimoe", "qwen3_next")
TOGETHER = ("gpt_oss", "llama4_text", "gemma4_text")  # families whose checkpoints have all experts in one tensor


def has_experts(case: Case) -> bool:
    config = hf_config(case)
    named = hasattr(config, "num_experts_per_tok") and case.name not in ("qwen3-moe-all-dense", "nemotron-h-dense")
    return named or getattr(config, "enable_moe_block", False)


ROUTED = [case for case in CASES if has_experts(case)]
MOE = [case for case in ROUTED if ALL or case.model_type not in LIKE]
FUSED = [case for case in (MOE if ALL else UNLIKE) if case in MOE and case.model_type not in TOGETHER]
# The routers of two families, and three experts, which divide by no axis.
SPREAD = [case for case in MOE if ALL or case.name in ("mixtral", "deepseek-v3")]


def with_router_loss(case):
    return dataclasses.replace(case, values={**case.values, "output_router_logits": True, "router_aux_loss_coef": 0.3})


def aux_of(model, params, ids, segments):
    return model.bind(params).hidden(jnp.asarray(ids), context(ids, segments))[2]


# Three ways to choose experts, and a layer without a router
BALANCED = [
    case for case in CASES
    if (case in MOE and case.model_type in WITH_LOSS if ALL else
        case.name in ("mixtral", "gpt-oss", "phimoe", "qwen3-moe-dense-first"))
]  # fmt: skip


@pytest.mark.parametrize("case", BALANCED, ids=str)
def test_balance_loss_and_its_gradient(case, tmp_path):
    """The loss is transformers' `aux_loss` with padding, and so is its gradient for the routers."""
    hf = make_hf(with_router_loss(case), tmp_path)
    model, params = load(tmp_path, attach_full)
    ids = tokens(3, 12)
    mask = np.ones((3, 12), np.int64)
    mask[1, 7:], mask[2, 3:] = 0, 0
    out = hf(torch.tensor(ids).long(), attention_mask=torch.tensor(mask))
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: aux_of(model, p, ids, mask.astype(np.int32))))(params)
    np.testing.assert_allclose(loss, 0.3 * out.aux_loss.item(), rtol=1e-5)
    out.aux_loss.backward()
    theirs = {name: parameter.grad for name, parameter in hf.named_parameters()}
    routers = [spec for path, spec in model.specs.items() if path.endswith((".gate.weight", ".router.weight"))]
    assert routers
    for spec in routers:
        for piece in spec.pieces():
            want = 0.3 * theirs[piece.name].numpy()
            np.testing.assert_allclose(gradient[spec.path][piece.index], want, atol=1e-3 * np.abs(want).max(), rtol=0)


def test_balance_loss_is_added_only_where_the_config_asks_for_it(tmp_path):
    case = next(case for case in MOE if not case.values.get("output_router_logits"))
    make_hf(case, tmp_path)
    model, params = load(tmp_path)
    ids = tokens(1, 8)
    assert jax.jit(lambda params: aux_of(model, params, ids, np.ones_like(ids)))(params) == 0


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_checkpoints_are_read_and_written_per_expert(case, tmp_path):
    """Reads the layout of transformers 5 in memory, which `save_original_format=False` writes."""
    hf = make_hf(case, tmp_path / "each")
    hf.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert any(name.endswith(("experts.gate_up_proj", "experts.up_proj")) for name in fused)
    want_model, want = load(tmp_path / "each")
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    for where in (mesh, one_device()):
        model, params = load(tmp_path / "fused", mesh=where)
        for path in want:
            np.testing.assert_array_equal(params[path], want[path], err_msg=path)
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", model, params, FullConfig(), tmp_path / "fused")
    stored, written = (load_file(tmp_path / name / "model.safetensors") for name in ("each", "out"))
    assert stored.keys() == written.keys()
    source = open_model(tmp_path / "fused")[1]
    streamed = {t.name: t.data() for t in model_tensors(want_model, from_source(source, {}), {}, FullConfig(), np.float32)}
    assert stored.keys() == streamed.keys()
    for name, value in stored.items():
        assert value.tobytes() == written[name].tobytes() == streamed[name].tobytes(), name


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_gradients_on_eight_devices(case, tmp_path):
    """Each device sorts its own tokens, or those of all for its own experts; gradients add up to those of transformers."""
    hf = make_hf(case, tmp_path / "base")
    ids = tokens(8, 10)
    weights = np.random.default_rng(1).normal(size=(8, 10, 96)).astype(np.float32)

    def gradient(mesh):
        model, params = load(tmp_path / "base", attach_full, mesh=mesh)

        def loss(params):
            ctx = context(ids)
            module = model.bind(params)
            return jnp.sum(module.unembed(module.hidden(jnp.asarray(ids), ctx)[0], ctx) * weights)

        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(loss))(params)

    (hf(torch.tensor(ids).long()).logits * torch.tensor(weights)).sum().backward()
    for parameter in hf.parameters():
        parameter.data = parameter.grad
    hf.save_pretrained(tmp_path / "gradients")
    model, want = load(tmp_path / "gradients", attach_full)  # they have the names and shapes of the weights
    want = {path: np.asarray(want[path]) for path in model.trainable}
    experts = next(leaf.shape[1] for path, leaf in want.items() if path.endswith(("experts.gate_up_proj", "experts.up_proj")))
    meshes = [
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"fsdp": 2, "tensor": 2, "sequence": 2},
        {"data": 2, "fsdp": 1, "expert": 4},
    ]
    every = case.name == "mixtral" or (ALL and case.name == "gpt-oss")
    for sizes in meshes if every else meshes[: 1 if experts % 2 == 0 else 2]:
        if experts % sizes.get("expert", 1):
            continue
        together = gradient(make_mesh(MeshConfig(**sizes)))
        for path, value in want.items():
            atol = 1e-4 * np.abs(value).max()
            np.testing.assert_allclose(together[path], value, atol=atol, rtol=0, err_msg=f"{sizes} {path}")


def test_experts_that_nobody_chose(tmp_path):
    """Every token is computed, however uneven the routing is."""
    hf = make_hf(Case("uneven", "mixtral", {"num_local_experts": 6}), tmp_path)
    with torch.no_grad():
        for layer in hf.model.layers:  # a token's logits are these multiples of one number: experts 2 and 3 never win
            direction = layer.mlp.gate.weight[0].clone()
            for row, factor in enumerate((1.0, 0.9, 0.1, -0.1, -0.9, -1.0)):
                layer.mlp.gate.weight[row] = factor * direction
    hf.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    ids = tokens(2, 16)
    np.testing.assert_allclose(logits(model, params, ids), hf_logits(hf, ids), atol=1e-4, rtol=0)
