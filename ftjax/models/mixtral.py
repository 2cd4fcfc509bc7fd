"""Mixtral: Llama's block with eight experts in place of its MLP (Jiang et al. 2024, arXiv:2401.04088)."""

from ftjax.models.attention import Pattern
from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.layer_types import window
from ftjax.models.llama import LlamaForCausalLM, attention
from ftjax.models.moe import Experts, MoeBlock, MoeModel, Router, SparseMoe
from ftjax.models.param import Layout
from ftjax.models.rope import make_rope, refuse_partial
from ftjax.models.stack import Stack

STORED = ("mlp", "block_sparse_moe")  # checkpoints use the module name of older transformers versions


def router_loss(facts: Facts) -> float:
    """Return the coefficient of the load-balancing loss; 0 unless `output_router_logits` is set, as in transformers."""
    coefficient = facts.get("router_aux_loss_coef", 0.0)
    return float(coefficient) if facts.get("output_router_logits", False) else 0.0


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `mixtral` config.json."""
    embed, layers, head_dim = facts["hidden_size"], facts["num_hidden_layers"], head_size(facts)
    eps, vocab, experts = facts["rms_norm_eps"], facts["vocab_size"], facts["num_local_experts"]
    facts.only("router_jitter_noise", 0.0, 0, None, why="noise on the router's inputs in training is not implemented")
    rope = refuse_partial(facts["rope_parameters"])
    gate = Router(embed, experts, facts["num_experts_per_tok"], normalise=True, layout=Layout("weight", module=STORED))
    mlp = SparseMoe(gate, Experts(embed, facts["intermediate_size"], experts, facts["hidden_act"], ("w1", "w3", "w2"), STORED))
    block = MoeBlock(attention(facts, bias=False), mlp, embed, eps, experts)
    stack = Stack(block, (Pattern(head_dim**-0.5, window(facts)),) * layers)
    rope = make_rope(rope, head_dim, facts["max_position_embeddings"])
    model = MoeModel(vocab, embed, eps, stack, rope, router_loss(facts), layers)
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
