"""OLMoE: norms over all heads of queries and keys, and many small experts (Muennighoff et al. 2024, arXiv:2409.02060).

Legend: B batch, T query length, E embed, N heads, K kv heads, H head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM, attention, whole_rope
from ftjax.models.mixtral import MoeBlock, MoeModel, router_loss
from ftjax.models.nn.attention import QueriesKeysValues
from ftjax.models.nn.context import Context
from ftjax.models.nn.experts import Experts, Router, SparseMoe
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import RMSNorm
from ftjax.models.nn.stack import Stack
from ftjax.models.olmo2 import Olmo2Attention


class OlmoeAttention(Olmo2Attention):
    """OLMo 2's attention, whose queries, keys and values may be bounded before RoPE.

    Attributes:
        bound: their largest magnitude, or None.
    """

    bound: float | None = None

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> QueriesKeysValues:
        qkv = super().project(x, ctx)
        return qkv if self.bound is None else tuple(jnp.clip(y, -self.bound, self.bound) for y in qkv)


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of an `olmoe` config.json."""
    embed, eps, vocab, head_dim = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"], head_size(facts)
    heads, kv_heads, layers = facts["num_attention_heads"], facts["num_key_value_heads"], facts["num_hidden_layers"]
    facts.only("head_dim", embed // heads, None, why="the norm of queries is over as many dimensions as a hidden state has")
    experts, top_k, normalise = facts["num_experts"], facts["num_experts_per_tok"], facts["norm_topk_prob"]
    norms = {"q_norm": RMSNorm(heads * head_dim, eps), "k_norm": RMSNorm(kv_heads * head_dim, eps)}
    layer = attention(facts, bias=facts["attention_bias"], kind=OlmoeAttention, **norms)
    layer.bound = facts["clip_qkv"]
    names = ("gate_proj", "up_proj", "down_proj")
    each = Experts(embed, facts["intermediate_size"], experts, facts["hidden_act"], names, None)
    block = MoeBlock(layer, SparseMoe(Router(embed, experts, top_k, normalise=normalise), each), embed, eps, experts)
    stack = Stack(block, (Pattern(head_dim**-0.5),) * layers)
    model = MoeModel(vocab, embed, eps, stack, whole_rope(facts), router_loss(facts), layers)
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
