"""Granite 3 MoE and PowerMoE: Granite's multipliers, and Mixtral's routed experts (IBM Granite Team 2024)."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from ftjax.mesh import constrain
from ftjax.models.causal_lm import read_sizes
from ftjax.models.facts import Facts
from ftjax.models.granite import GraniteForCausalLM, times
from ftjax.models.llama import attention, whole_rope
from ftjax.models.mixtral import MoeModel, router_loss
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context, Tokens
from ftjax.models.nn.experts import Experts, Router, SparseMoe
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, RMSNorm
from ftjax.models.nn.param import Layout
from ftjax.models.nn.stack import Stack

STORED = "block_sparse_moe"


class GraniteMoeBlock(nnx.Module):
    """Granite's block with a layer of experts, under the name that transformers has for it in this family."""

    def __init__(self, attention: nnx.Module, experts: SparseMoe, embed: int, eps: float, residual: float):
        self.self_attn, self.block_sparse_moe, self.residual = attention, experts, residual
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(embed, eps), RMSNorm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer: Any, cache: Memories):
        y, cache = self.self_attn(self.input_layernorm(x), ctx, pattern, layer, cache)
        x = constrain(x + times(self.attention_adapters(x, y, ctx), self.residual), "batch", "length", None)
        y, sums = self.block_sparse_moe(self.post_attention_layernorm(x), ctx)
        x = x + times(self.output_adapters(x, y, ctx), self.residual)
        return constrain(x, "batch", "length", None), cache, sums


class GraniteMoeModel(MoeModel):
    """Mixtral's model, with its embeddings multiplied by `multiplier`."""

    multiplier: float

    def embed(self, tokens: Tokens, dtype: Any) -> Float[Array, "B T E"]:
        return times(self.embed_tokens(tokens, dtype), self.multiplier)


def stored_as(variable: nnx.Variable, module: str) -> None:
    """Give a parameter the name `<module>.weight` that it has in checkpoints, in a single tensor."""
    part = f"{STORED}.{'router' if 'router' in module else 'experts'}"
    layout = Layout("weight", module=(part, f"{STORED}.{module}"))
    variable.set_metadata("row", dataclasses.replace(variable.row, layouts=(layout,)))


def routed(facts: Facts) -> SparseMoe:
    """Build the layer of experts."""
    embed, count, top_k = facts["hidden_size"], facts["num_local_experts"], facts["num_experts_per_tok"]
    router = Router(embed, count, top_k, normalise=True)
    experts = Experts(embed, facts["intermediate_size"], count, facts["hidden_act"], ("gate", "up", "down"), None)
    stored_as(router.weight, "router.layer")
    stored_as(experts.gate_up_proj, "input_linear")
    stored_as(experts.down_proj, "output_linear")
    return SparseMoe(router, experts, name="router")


def build(facts: Facts) -> GraniteForCausalLM:
    """Build the abstract model of a `granitemoe` config.json."""
    embed, eps, vocab, layers = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"], facts["num_hidden_layers"]
    facts.only("position_embedding_type", "rope", why="layers of this family rotate queries and keys")  # by transformers 4
    parts = attention(facts, bias=facts["attention_bias"]), routed(facts)
    block = GraniteMoeBlock(*parts, embed, eps, facts["residual_multiplier"])
    stack = Stack(block, (Pattern(facts["attention_multiplier"]),) * layers)
    model = GraniteMoeModel(vocab, embed, eps, stack, whole_rope(facts), router_loss(facts), layers)
    model.multiplier = facts["embedding_multiplier"]
    return GraniteForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"], facts["logits_scaling"])
