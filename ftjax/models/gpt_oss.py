"""gpt-oss: attention sinks, sliding windows in every other layer, experts with biases and a clamped SwiGLU.

Source: OpenAI 2025 (arXiv:2508.10925). MXFP4 checkpoints are dequantised on reading (`ftjax.hub.packed.mxfp4`).

Legend: M tokens, D embed, F mlp, X experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM, attention
from ftjax.models.mixtral import MoeBlock, MoeModel, router_loss
from ftjax.models.nn.experts import ExpertMatrices, Group, Router, SparseMoe
from ftjax.models.nn.layer_types import patterns
from ftjax.models.nn.layers import RMSNorm
from ftjax.models.nn.param import Init, param
from ftjax.models.nn.rope import make_rope, refuse_partial
from ftjax.models.nn.stack import Stack


class GptOssExperts(ExpertMatrices):
    """`down((up + 1) * gate * sigmoid(alpha * gate))` with gate and up clamped; their columns are interleaved."""

    AXES = {  # noqa: RUF012
        "gate_up_proj": ("experts", "embed", "mlp"),
        "gate_up_proj_bias": ("experts", "mlp"),
        "down_proj": ("experts", "mlp", "embed"),
        "down_proj_bias": ("experts", "embed"),
    }
    INPUT_AXES = {"gate_up_proj": -2, "down_proj": -2}  # noqa: RUF012

    def __init__(self, embed: int, mlp: int, experts: int, alpha: float, limit: float):
        self.alpha, self.limit = alpha, limit
        shapes = {
            "gate_up_proj": (experts, embed, 2 * mlp),
            "gate_up_proj_bias": (experts, 2 * mlp),
            "down_proj": (experts, mlp, embed),
            "down_proj_bias": (experts, embed),
        }
        for name, shape in shapes.items():
            init = Init("zeros") if name.endswith("bias") else Init("normal", 0.02)
            setattr(self, name, param(shape, self.AXES[name], name, init=init))
        self.leave_room()

    def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        def feedforward(group: Group, params: dict[str, jax.Array]) -> jax.Array:
            def bias(name: str) -> jax.Array:
                return params[name].astype(x.dtype)[group.owner]

            gate_up = self.product(group, group.rows, params, "gate_up_proj") + bias("gate_up_proj_bias")
            gate = jnp.minimum(gate_up[:, ::2], self.limit)
            up = jnp.clip(gate_up[:, 1::2], -self.limit, self.limit)
            hidden = (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)
            return self.product(group, hidden, params, "down_proj") + bias("down_proj_bias") * group.once

        return self.routed(x, chosen, weights, feedforward)


class GptOssBlock(MoeBlock):
    def __init__(self, attention: nnx.Module, mlp: nnx.Module, embed: int, eps: float, experts: int):
        super().__init__(attention, mlp, embed, eps, experts)
        self.input_layernorm = RMSNorm(embed, eps, round_first=False)
        self.post_attention_layernorm = RMSNorm(embed, eps, round_first=False)


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `gpt_oss` config.json."""
    embed, head_dim = facts["hidden_size"], head_size(facts)
    eps, vocab, experts = facts["rms_norm_eps"], facts["vocab_size"], facts["num_local_experts"]
    # OpenAI's file gives experts per token and context length under two names; the activation is always the clamped SwiGLU.
    facts.inert("hidden_act", "experts_per_token", "initial_context_length")
    mlp = SparseMoe(
        Router(embed, experts, facts["num_experts_per_tok"], normalise=True, bias=True),
        GptOssExperts(embed, facts["intermediate_size"], experts, facts["swiglu_alpha"], facts["swiglu_limit"]),
        name="router",
    )
    kinds = patterns(facts, head_dim**-0.5)
    rope = make_rope(refuse_partial(facts["rope_parameters"]), head_dim, facts["max_position_embeddings"])
    stack = Stack(GptOssBlock(attention(facts, bias=facts["attention_bias"], sinks=True), mlp, embed, eps, experts), kinds)
    model = MoeModel(vocab, embed, eps, stack, rope, router_loss(facts), len(kinds))
    model.norm = RMSNorm(embed, eps, round_first=False)
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
