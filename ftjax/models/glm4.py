"""GLM-4: norms before and after each sublayer, and RoPE on neighbouring dimensions of a part of each head.

Source: GLM Team 2024 (arXiv:2406.12793); the files are GLM-4-0414's.
"""

import jax
import jax.numpy as jnp

from ftjax.mesh import constrain
from ftjax.models.causal_lm import head_size
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaAttention, LlamaBlock, LlamaForCausalLM, attention, decoder
from ftjax.models.nn.attention import self_attention
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import RMSNorm
from ftjax.models.nn.rope import apply_interleaved, make_rope
from ftjax.models.phi3 import Phi3MLP


class Glm4Attention(LlamaAttention):
    def attend(self, qkv: tuple[jax.Array, ...], ctx: Context, pattern: Pattern, layer, cache: Memories):
        y, cache = self_attention(*qkv, ctx, pattern, layer, cache, rotate=apply_interleaved)
        return self.o_proj(y, ctx), cache


class Glm4Block(LlamaBlock):
    def __init__(self, attention: LlamaAttention, mlp: Phi3MLP, embed: int, eps: float):
        super().__init__(attention, mlp, embed, eps)
        self.post_self_attn_layernorm, self.post_mlp_layernorm = RMSNorm(embed, eps), RMSNorm(embed, eps)

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        y, cache = self.self_attn(self.input_layernorm(x), ctx, pattern, layer, cache)
        y = self.post_self_attn_layernorm(self.attention_adapters(x, y, ctx))
        x = constrain(x + y, "batch", "length", None)
        y = self.output_adapters(x, self.mlp(self.post_attention_layernorm(x), ctx), ctx)
        return constrain(x + self.post_mlp_layernorm(y), "batch", "length", None), cache, jnp.float32(0)


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `glm4` config.json."""
    embed, eps, head_dim = facts["hidden_size"], facts["rms_norm_eps"], head_size(facts)
    facts.inert("partial_rotary_factor")  # transformers has moved it to rope_parameters
    layer = attention(facts, bias=facts["attention_bias"], bias_out=False, kind=Glm4Attention)
    block = Glm4Block(layer, Phi3MLP(embed, facts["intermediate_size"], facts["hidden_act"]), embed, eps)
    kinds = (Pattern(head_dim**-0.5),) * facts["num_hidden_layers"]
    return decoder(facts, block, kinds, make_rope(facts["rope_parameters"], head_dim, facts["max_position_embeddings"]))
