"""GLM-4.5: grouped-query attention with RoPE on a part of each head, and the routed and shared experts of DeepSeek V3.

Covers all models with `model_type: glm4_moe`: GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7. Source: GLM Team 2025
(arXiv:2508.06471).
"""

from flax import nnx

from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.deepseek_v3 import carry_extra_layers, corrected_router, first_dense, sparse_mlp
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM, attention
from ftjax.models.mixtral import MoeBlock, MoeModel, dense_mlp, moe_stack
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import RMSNorm
from ftjax.models.nn.rope import make_rope


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `glm4_moe` config.json."""
    embed, eps, vocab, head_dim = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"], head_size(facts)
    dense, act, experts = facts["intermediate_size"], facts["hidden_act"], facts["n_routed_experts"]
    facts.inert("partial_rotary_factor", "output_router_logits")  # moved to rope_parameters; without effect on the loss
    bias, normed, router = facts["attention_bias"], facts["use_qk_norm"], corrected_router(facts)

    def block(routed: bool) -> nnx.Module:
        norms = {name: RMSNorm(head_dim, eps) for name in ("q_norm", "k_norm") if normed}
        mlp = sparse_mlp(facts, router) if routed else dense_mlp(embed, dense, act)
        return MoeBlock(attention(facts, bias=bias, bias_out=False, **norms), mlp, embed, eps, experts)

    sparse = first_dense(facts)
    stack = moe_stack(block, (Pattern(head_dim**-0.5),) * len(sparse), sparse)
    rope = make_rope(facts["rope_parameters"], head_dim, facts["max_position_embeddings"])
    model = MoeModel(vocab, embed, eps, stack, rope, 0.0, sum(sparse))
    carry_extra_layers(facts)
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
