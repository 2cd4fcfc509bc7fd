"""Granite 4: Mamba-2, and attention in a few layers, Granite's multipliers, and experts beside an MLP that all tokens share
(IBM Granite Team 2025).

Source: transformers, models/granitemoehybrid/modeling_granitemoehybrid.py.

Legend: B batch, T length, E embed, F mlp.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.bamba import mamba2
from ftjax.models.causal_lm import read_sizes
from ftjax.models.facts import Facts
from ftjax.models.granite import GraniteForCausalLM, GraniteModel, times
from ftjax.models.granitemoe import GraniteMoeModel, routed
from ftjax.models.llama import LlamaAttention, attention, whole_rope
from ftjax.models.mixtral import router_loss
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.experts import SparseMoe
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, Linear, RMSNorm, activation
from ftjax.models.nn.mamba2 import Mamba2
from ftjax.models.nn.remat import projected
from ftjax.models.nn.stack import Stack

TYPES = {"linear_attention": "mamba", "full_attention": "attention"}


class SharedMLP(nnx.Module):
    """`output_linear(act(gate) * up)`, with gate and up from one projection."""

    def __init__(self, embed: int, mlp: int, act: str):
        self.act = activation(act)
        self.input_linear = Linear(embed, 2 * mlp, ("embed", "mlp"))
        self.output_linear = Linear(mlp, embed, ("mlp", "embed"))

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        gate, up = jnp.split(self.input_linear(x, ctx), 2, axis=-1)
        return self.output_linear(self.act(gate) * up, ctx)


class GraniteMoeHybridBlock(nnx.Module):
    """A mixer, Mamba-2 or attention, and an MLP with or without experts; `residual` multiplies the result of both."""

    def __init__(
        self, mixer: Mamba2 | LlamaAttention, moe: SparseMoe | None, mlp: SharedMLP, embed: int, eps: float, residual: float
    ):
        self.mamba = mixer if isinstance(mixer, Mamba2) else None
        self.self_attn = mixer if isinstance(mixer, LlamaAttention) else None
        self.block_sparse_moe, self.shared_mlp, self.residual = moe, mlp, residual
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(embed, eps), RMSNorm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        mixer = self.mamba or self.self_attn
        y, cache = mixer.attend(projected(self.input_layernorm, mixer, x, ctx), ctx, pattern, layer, cache)
        x = constrain(x + times(self.attention_adapters(x, y, ctx), self.residual), "batch", "length", None)
        h, sums = self.post_attention_layernorm(x), jnp.float32(0)
        y = self.shared_mlp(h, ctx)
        if self.block_sparse_moe is not None:
            own, sums = self.block_sparse_moe(h, ctx)
            y = own + y
        x = x + times(self.output_adapters(x, y, ctx), self.residual)
        return constrain(x, "batch", "length", None), cache, sums


def layer_types(facts: Facts) -> tuple[str, ...]:
    """Read the kind of each layer. Raises UserError for other kinds."""
    types = tuple(facts["layer_types"])
    if set(types) - TYPES.keys() or len(types) != facts["num_hidden_layers"]:
        raise UserError(
            f"config.json of this {facts.model_type} model has layer_types {', '.join(map(str, types))} for "
            f"{facts['num_hidden_layers']} layers; expected {' or '.join(TYPES)} for each"
        )
    return tuple(TYPES[kind] for kind in types)


def build(facts: Facts) -> GraniteForCausalLM:
    """Build the abstract model of a `granitemoehybrid` config.json."""
    embed, eps, vocab, types = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"], layer_types(facts)
    # Of IBM's training code, in published files; transformers reads neither.
    facts.only("normalization_function", "rmsnorm", None, why="transformers has RMS norms in any case")
    facts.inert("init_method")
    experts, scale = facts["num_local_experts"], float(facts["attention_multiplier"])
    residual, multiplier = float(facts["residual_multiplier"]), float(facts["embedding_multiplier"])
    mixers = {"mamba": mamba2(facts), "attention": attention(facts, bias=facts["attention_bias"])}
    blocks = {
        kind: GraniteMoeHybridBlock(
            mixer,
            routed(facts) if experts else None,
            SharedMLP(embed, facts["shared_intermediate_size"], facts["hidden_act"]),
            embed,
            eps,
            residual,
        )
        for kind, mixer in mixers.items()
    }
    stack = Stack(blocks, (Pattern(scale),) * len(types), types)
    rope = whole_rope(facts) if facts["position_embedding_type"] == "rope" else {}
    if experts:
        model = GraniteMoeModel(vocab, embed, eps, stack, rope, router_loss(facts), len(types))
        model.multiplier = multiplier
    else:
        model = GraniteModel(vocab, embed, eps, stack, rope, multiplier)
        facts.inert("intermediate_size", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
    return GraniteForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"], float(facts["logits_scaling"]))
