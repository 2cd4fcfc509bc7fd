"""Tests that a program does not grow with the number of layers, and so neither does compile time."""

import functools

import jax
import jax.numpy as jnp
import pytest
from cases import FEW as TRIED
from oracle import Case, hf_config
from processes import ALL

from ftjax.config import Config, LoraConfig
from ftjax.methods import method_of
from ftjax.models.facts import complete_config
from ftjax.models.model import Model, build_module
from ftjax.models.nn.context import Context
from ftjax.models.registry import FAMILIES
from ftjax.objectives import sft
from ftjax.objectives.objective import LossInputs

CONFIG = Config.model_validate({"model": {"path": "none"}, "data": {"train": "none"}})
DEPTHS = (12, 36)  # whole periods of every family: the longest is six layers

FEW = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {
    "bamba": {"mamba_n_heads": 4, "attn_layer_indices": list(range(2, 36, 4))},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_ssm": None},
    "granitemoehybrid": {"mamba_n_heads": 4, "num_local_experts": 4},
    "lfm2_moe": FEW,
    "deepseek_v3": {"n_routed_experts": 16, "num_key_value_heads": 4},
    "deepseek_v2": {"n_routed_experts": 16, "num_experts_per_tok": 4, "num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "gpt_oss": {"num_local_experts": 4},
    "qwen3_moe": FEW,
    "qwen3_5_moe": FEW,
    "qwen3_5_moe_text": FEW,
    "qwen3_next": FEW,
}


def operations(family: str, layers: int) -> int:
    """Return the number of lines of the lowered loss with LoRA; for Llama, or in the sweep, of its gradient."""
    values = {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    values |= EXPERTS.get(family, {})
    if family == "lfm2_moe":
        values["layer_types"] = ["conv", "conv", "full_attention"] * (layers // 3)
    if family == "nemotron_h":  # the number of layers follows from their kinds
        values["layers_block_type"] = ["mamba", "moe", "mamba", "moe", "attention", "mlp"] * (layers // 6)
    if FAMILIES[family].composite:
        values = {"text_config": {"model_type": FAMILIES[family].module, **values}}
    facts = complete_config(hf_config(Case(family, family, values)).to_dict(), family)
    root = build_module(facts)
    config = LoraConfig(target_modules="all-linear")
    method_of(config).attach(root, config)
    model = Model.of(root, facts)
    assert max(spec.stacked[0] for spec in model.specs.values() if spec.stacked) * 6 >= layers

    def loss(trainable, frozen, batch):
        ctx = Context(batch["positions"], batch["segment_ids"], remat="full")
        totals, aux = sft.loss(LossInputs(model, trainable, frozen, batch, ctx, 64, CONFIG))
        return totals.loss + aux

    parts = [{path: jax.ShapeDtypeStruct(s.shape, s.dtype) for path, s in p.items()} for p in (model.trainable, model.frozen)]
    batch = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct((2, 16), jnp.float32)
    lowered = jax.grad(loss) if ALL or family == "llama" else loss
    return len(jax.jit(lowered).lower(*parts, batch).as_text().splitlines())


@pytest.mark.parametrize("family", [case.model_type for case in TRIED])
def test_deep_programs_are_as_long_as_shallow_ones(family):
    count = functools.partial(operations, family)
    shallow, deep = map(count, DEPTHS)
    assert shallow == deep
