"""Mixtral: Llama's block with eight experts in place of its MLP (Jiang et al. 2024, arXiv:2401.04088)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from ftjax.mesh import constrain
from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaBlock, LlamaForCausalLM, LlamaMLP, LlamaModel, attention
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.experts import Experts, Router, SparseMoe, balance_loss
from ftjax.models.nn.layer_types import Pattern, window
from ftjax.models.nn.param import Layout
from ftjax.models.nn.rope import Rope, make_rope, refuse_partial
from ftjax.models.nn.stack import Stack

STORED = ("mlp", "block_sparse_moe")  # checkpoints use the module name of older transformers versions


class MoeBlock(LlamaBlock):
    """Llama's block with a sparse or, in some layers of some models, dense MLP."""

    def __init__(self, attention: nnx.Module, mlp: nnx.Module, embed: int, eps: float, experts: int):
        super().__init__(attention, mlp, embed, eps)
        self.experts = experts

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer: Any, cache: Memories):
        y, cache = self.self_attn(self.input_layernorm(x), ctx, pattern, layer, cache)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        y = self.mlp(self.post_attention_layernorm(x), ctx)
        if isinstance(y, tuple):
            y, sums = y
        else:
            sums = {"chosen": jnp.zeros(self.experts), "probability": jnp.zeros(self.experts)}
        y = self.output_adapters(x, y, ctx)
        return constrain(x + y, "batch", "length", None), cache, sums


class MoeModel(LlamaModel):
    """Llama's model with a load-balancing loss; its coefficient `router_loss` is 0 unless the config sets it."""

    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack, rope: Rope, router_loss: float, sparse: int):
        """`sparse` is the number of layers with a router."""
        super().__init__(vocab, embed, eps, layers, rope)
        self.router_loss, self.sparse = router_loss, sparse

    def __call__(self, tokens: Shaped[Array, "B T ..."], ctx: Context, cache: Memories = None):
        x, cache, sums = super().__call__(tokens, ctx, cache)
        loss = self.router_loss * balance_loss(sums, self.sparse, ctx.segment_ids) if self.router_loss else jnp.float32(0)
        return x, cache, loss


def router_loss(facts: Facts) -> float:
    """Return the coefficient of the load-balancing loss; 0 unless `output_router_logits` is set, as in transformers."""
    coefficient = facts.get("router_aux_loss_coef", 0.0)
    return float(coefficient) if facts.get("output_router_logits", False) else 0.0


def dense_mlp(embed: int, mlp: int, act: str, bias: bool = False) -> LlamaMLP:
    """Build the feed-forward layer of a model whose other layers have experts, or one that all tokens share beside experts."""
    layer = LlamaMLP(embed, mlp, act, bias)
    # PEFT treats layers with these names as experts of transformers 4 checkpoints, wherever they are.
    layer.gate_proj.adaptable = layer.up_proj.adaptable = layer.down_proj.adaptable = False
    return layer


def moe_stack(block: Callable[[bool], nnx.Module], kinds: tuple[Pattern, ...], sparse: tuple[bool, ...]) -> Stack:
    """Stack the layers with experts and the dense ones separately; `block` builds a layer with experts or a dense one."""
    if len(set(sparse)) == 1:
        return Stack(block(sparse[0]), kinds)
    blocks = {"sparse": block(True), "dense": block(False)}
    return Stack(blocks, kinds, tuple("sparse" if here else "dense" for here in sparse))


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
