"""Qwen 3.5 MoE, text only: Qwen 3.5 with many small experts and a gated shared expert in every layer.

Source: transformers, models/qwen3_5_moe/modeling_qwen3_5_moe.py (`Qwen3_5MoeForCausalLM`).
"""

from ftjax.models.causal_lm import read_sizes
from ftjax.models.facts import Facts
from ftjax.models.gemma import gemma_norm
from ftjax.models.llama import LlamaForCausalLM, LlamaMLP
from ftjax.models.mixtral import MoeModel, router_loss
from ftjax.models.nn.experts import Experts, Router, SharedMoe
from ftjax.models.nn.stack import Stack
from ftjax.models.qwen3_5_text import Qwen3_5DeltaNet, published, stack_of, text_rope


def shared_moe(facts: Facts, *, normalise: bool) -> SharedMoe:
    """Build experts with a shared one. With `normalise`, the weights of the chosen experts sum to 1."""
    embed, experts, act = facts["hidden_size"], facts["num_experts"], facts["hidden_act"]
    router = Router(embed, experts, facts["num_experts_per_tok"], normalise=normalise)
    small = Experts(embed, facts["moe_intermediate_size"], experts, act, ("gate_proj", "up_proj", "down_proj"), None)
    return SharedMoe(router, small, LlamaMLP(embed, facts["shared_expert_intermediate_size"], act, False), embed)


def moe_model(facts: Facts, stack: Stack, sparse: int) -> LlamaForCausalLM:
    """Build the whole model around its layers, of which so many are `sparse`."""
    embed, eps = facts["hidden_size"], facts["rms_norm_eps"]
    rope = text_rope(facts, facts["head_dim"])
    model = MoeModel(facts["vocab_size"], embed, eps, stack, rope, router_loss(facts), sparse)
    model.norm = gemma_norm(embed, eps)
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `qwen3_5_moe_text` config.json."""
    published(facts)
    facts.only("mlp_only_layers", [], None, why="every layer of this model has experts")
    layers = facts["num_hidden_layers"]
    moe = lambda _: shared_moe(facts, normalise=True)  # noqa: E731
    return moe_model(facts, stack_of(facts, Qwen3_5DeltaNet, moe, (True,) * layers, facts["num_experts"]), layers)
