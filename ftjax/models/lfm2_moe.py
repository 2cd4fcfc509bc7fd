"""LFM2 MoE: LFM2 with routed experts in all but the first layers (Liquid AI 2025, arXiv:2511.23404).

Source: transformers, models/lfm2_moe/modeling_lfm2_moe.py.

Legend: B batch, T length, E embed, X experts, k experts per token.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.lfm2 import Lfm2Block, Lfm2MLP, Lfm2Model, layer_types, mixer
from ftjax.models.llama import LlamaForCausalLM, whole_rope
from ftjax.models.nn.context import Context
from ftjax.models.nn.experts import Experts
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import project
from ftjax.models.nn.param import Init, param
from ftjax.models.nn.stack import Stack


class SigmoidRouter(nnx.Module):
    """Scores each token for each expert. Like `Router`, it is not a `Linear`."""

    def __init__(self, embed: int, experts: int, top_k: int, *, normalise: bool, scale: float):
        """With `normalise`, the weights of the chosen experts sum to 1 before they are multiplied by `scale`."""
        self.top_k, self.normalise, self.scale = top_k, normalise, scale
        self.weight = param((experts, embed), ("experts", "embed"), "weight")

    def __call__(
        self, x: Float[Array, "B T E"], bias: Float32[Array, " X"] | None
    ) -> tuple[Int32[Array, "B T k"], Float32[Array, "B T k"]]:
        """Return the chosen experts of each token, and their weights; `bias` is added to the scores for the choice only."""
        scores = jax.nn.sigmoid(project(x, self.weight[...]).astype(jnp.float32))
        rank = jax.lax.stop_gradient(scores)
        _, chosen = jax.lax.top_k(rank if bias is None else rank + bias, self.top_k)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalise:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-6)
        return chosen, weights * self.scale


class Lfm2Moe(nnx.Module):
    """Routed experts, each an MLP; a bias that no gradient trains balances how often they are chosen."""

    def __init__(self, router: SigmoidRouter, experts: Experts, count: int, corrected: bool):
        self.gate, self.experts = router, experts
        bias = param((count,), ("experts",), "expert_bias", init=Init("zeros"), constant=True, float32=True)
        self.expert_bias = bias if corrected else None

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        chosen, weights = self.gate(x, None if self.expert_bias is None else self.expert_bias[...])
        return self.experts(x, chosen, weights)


def moe(facts: Facts) -> Lfm2Moe:
    """Build the layer of experts."""
    embed, count, top_k = facts["hidden_size"], facts["num_experts"], facts["num_experts_per_tok"]
    scale, normalise = float(facts["routed_scaling_factor"]), bool(facts["norm_topk_prob"])
    router = SigmoidRouter(embed, count, top_k, normalise=normalise, scale=scale)
    experts = Experts(embed, facts["moe_intermediate_size"], count, "silu", ("w1", "w3", "w2"), None)
    return Lfm2Moe(router, experts, count, bool(facts["use_expert_bias"]))


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `lfm2_moe` config.json."""
    embed, eps, head_dim, types = facts["hidden_size"], facts["norm_eps"], head_size(facts), layer_types(facts)
    dense, mlp = facts["num_dense_layers"], facts["intermediate_size"]
    facts.inert("conv_L_cache", "conv_bias")  # where no layer is a convolution
    facts.inert("output_router_logits")  # transformers has no loss on them
    choice = tuple(f"{kind}_{'dense' if layer < dense else 'sparse'}" for layer, kind in enumerate(types))

    def block(name: str) -> Lfm2Block:
        kind, _, sort = name.rpartition("_")
        return Lfm2Block(mixer(facts, kind), Lfm2MLP(embed, mlp) if sort == "dense" else moe(facts), embed, eps)

    names = [f"{kind}_{sort}" for kind in sorted(set(types)) for sort in ("dense", "sparse")]
    stack = Stack({name: block(name) for name in names}, (Pattern(head_dim**-0.5),) * len(types), choice)
    model = Lfm2Model(facts["vocab_size"], embed, eps, stack, whole_rope(facts))
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
