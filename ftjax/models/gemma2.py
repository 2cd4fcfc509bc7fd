"""Gemma 2: norms before and after each sublayer, soft-capped scores and logits, sliding windows in every other layer.

Source: Gemma Team 2024 (arXiv:2408.00118).
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.mesh import constrain
from ftjax.models.causal_lm import read_sizes
from ftjax.models.facts import Facts
from ftjax.models.gemma import GemmaForCausalLM, GemmaModel, attention_and_mlp, gemma_norm
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern, patterns
from ftjax.models.nn.layers import IdentityAdapter
from ftjax.models.nn.rope import make_rope, refuse_partial
from ftjax.models.nn.stack import Stack


class Gemma2Block(nnx.Module):
    def __init__(self, attention: nnx.Module, mlp: nnx.Module, embed: int, eps: float):
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = gemma_norm(embed, eps)
        self.post_attention_layernorm = gemma_norm(embed, eps)
        self.pre_feedforward_layernorm = gemma_norm(embed, eps)
        self.post_feedforward_layernorm = gemma_norm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        y, cache = self.self_attn(self.input_layernorm(x), ctx, pattern, layer, cache)
        y = self.attention_adapters(x, y, ctx)
        x = constrain(x + self.post_attention_layernorm(y), "batch", "length", None)
        y = self.output_adapters(x, self.mlp(self.pre_feedforward_layernorm(x), ctx), ctx)
        x = x + self.post_feedforward_layernorm(y)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


def build(facts: Facts) -> GemmaForCausalLM:
    """Build the abstract model of a `gemma2` config.json."""
    embed, eps, vocab, head_dim = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"], facts["head_dim"]
    # Google's exports name the activation and the window twice; transformers reads the other names.
    facts.inert("hidden_act", "sliding_window_size")
    rope = refuse_partial(facts["rope_parameters"])
    block = Gemma2Block(*attention_and_mlp(facts, "hidden_activation"), embed, eps)
    kinds = patterns(facts, facts["query_pre_attn_scalar"] ** -0.5, facts["attn_logit_softcapping"])
    model = GemmaModel(vocab, embed, eps, Stack(block, kinds), make_rope(rope, head_dim, facts["max_position_embeddings"]))
    return GemmaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"], facts["final_logit_softcapping"])
