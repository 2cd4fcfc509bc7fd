"""Qwen 3 MoE: normalised queries and keys, many small experts, and dense layers where the config says so.

Source: Qwen Team 2025 (arXiv:2505.09388).
"""

from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM, attention
from ftjax.models.mixtral import MoeBlock, MoeModel, dense_mlp, moe_stack, router_loss
from ftjax.models.nn.experts import Experts, Router, SparseMoe
from ftjax.models.nn.layer_types import Pattern, window
from ftjax.models.nn.layers import RMSNorm
from ftjax.models.nn.rope import make_rope, refuse_partial


def sparse_layers(facts: Facts, layers: int, experts: int) -> tuple[bool, ...]:
    """Return for each layer whether it has experts: every `decoder_sparse_step`-th, except those in `mlp_only_layers`."""
    dense, step = facts["mlp_only_layers"] or (), facts["decoder_sparse_step"]
    return tuple(layer not in dense and experts > 0 and (layer + 1) % step == 0 for layer in range(layers))


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `qwen3_moe` config.json."""
    embed, layers, head_dim = facts["hidden_size"], facts["num_hidden_layers"], head_size(facts)
    eps, vocab, experts = facts["rms_norm_eps"], facts["vocab_size"], facts["num_local_experts"]
    # transformers has set sliding_window to None if use_sliding_window is off, and ignores max_window_layers here.
    facts.inert("use_sliding_window", "max_window_layers")
    rope = refuse_partial(facts["rope_parameters"])
    act, top_k, normalise = facts["hidden_act"], facts["num_experts_per_tok"], facts["norm_topk_prob"]
    dense, small = facts["intermediate_size"], facts["moe_intermediate_size"]

    def block(sparse: bool) -> MoeBlock:
        norms = {"q_norm": RMSNorm(head_dim, eps), "k_norm": RMSNorm(head_dim, eps)}
        if sparse:
            names = ("gate_proj", "up_proj", "down_proj")
            mlp = SparseMoe(
                Router(embed, experts, top_k, normalise=normalise), Experts(embed, small, experts, act, names, None)
            )
        else:
            mlp = dense_mlp(embed, dense, act)
        return MoeBlock(attention(facts, bias=facts["attention_bias"], **norms), mlp, embed, eps, max(experts, 1))

    sparse = sparse_layers(facts, layers, experts)
    kinds = (Pattern(head_dim**-0.5, window(facts)),) * layers
    stack = moe_stack(block, kinds, sparse)
    rope = make_rope(rope, head_dim, facts["max_position_embeddings"])
    model = MoeModel(vocab, embed, eps, stack, rope, router_loss(facts), sum(sparse))
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
