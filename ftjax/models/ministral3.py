"""Ministral 3: Mistral whose queries grow with their position in long texts, as in Llama 4.

Source: transformers, models/ministral3/modeling_ministral3.py (`get_llama_4_attn_scale`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaAttention, LlamaBlock, LlamaForCausalLM, attention, decoder, mlp, whole_rope
from ftjax.models.nn.attention import QueriesKeysValues
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern, window


class ScaledAttention(LlamaAttention):
    """Attention whose queries are multiplied by `1 + beta log(1 + floor(position / original))`."""

    def __init__(self, *sizes, beta: float, original: int, **options):
        super().__init__(*sizes, **options)
        self.beta, self.original = beta, original

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> QueriesKeysValues:
        """Project `x [B, T, E]` as in Llama; the queries have their scale already, which RoPE does not change."""
        q, k, v = super().project(x, ctx)
        scale = 1 + self.beta * jnp.log1p((ctx.positions // self.original).astype(jnp.float32))
        return q * scale[..., None, None].astype(q.dtype), k, v


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `ministral3` config.json."""
    rope = facts["rope_parameters"]
    options = {"beta": rope["llama_4_scaling_beta"], "original": rope["original_max_position_embeddings"]}
    scaled = attention(facts, bias=False, kind=ScaledAttention, **options)
    block = LlamaBlock(scaled, mlp(facts), facts["hidden_size"], facts["rms_norm_eps"])
    kinds = (Pattern(head_size(facts) ** -0.5, window(facts)),) * facts["num_hidden_layers"]
    return decoder(facts, block, kinds, whole_rope(facts))
