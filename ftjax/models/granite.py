"""Granite 3 and 4 dense: Llama with multipliers on embeddings, scores, residuals and logits (IBM Granite Team 2024).

Legend: B batch, T query length, E embed, V vocab.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from ftjax.mesh import constrain
from ftjax.models.causal_lm import Sizes, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaBlock, LlamaForCausalLM, LlamaModel, attention, mlp, whole_rope
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context, Tokens
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.rope import Rope
from ftjax.models.nn.stack import Stack


def times(x: Float[Array, "*of"], factor: float) -> Float[Array, "*of"]:
    """Multiply in float32: in bfloat16 the factor itself would be rounded."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


class GraniteBlock(LlamaBlock):
    """Llama's block, with the result of each sublayer multiplied by `residual`."""

    def __init__(self, attention: nnx.Module, mlp: nnx.Module, embed: int, eps: float, residual: float):
        super().__init__(attention, mlp, embed, eps)
        self.residual = residual

    def __call__(self, x: Float[Array, "B T E"], ctx: Context, pattern: Pattern, layer, cache: Memories):
        y, cache = self.self_attn(self.input_layernorm(x), ctx, pattern, layer, cache)
        x = constrain(x + times(self.attention_adapters(x, y, ctx), self.residual), "batch", "length", None)
        y = self.mlp(self.post_attention_layernorm(x), ctx)
        x = x + times(self.output_adapters(x, y, ctx), self.residual)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


class GraniteModel(LlamaModel):
    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack, rope: Rope, multiplier: float):
        """`multiplier` scales the embeddings."""
        super().__init__(vocab, embed, eps, layers, rope)
        self.multiplier = multiplier

    def embed(self, tokens: Tokens, dtype) -> Float[Array, "B T E"]:
        return times(self.embed_tokens(tokens, dtype), self.multiplier)


class GraniteForCausalLM(LlamaForCausalLM):
    def __init__(self, model: GraniteModel, sizes: Sizes, tied: bool, scaling: float):
        """Logits are divided by `scaling`."""
        super().__init__(model, sizes, tied)
        self.scaling = scaling

    def unembed(self, x: Float[Array, "*of E"], ctx: Context) -> Float32[Array, "*of V"]:
        return super().unembed(x, ctx) / self.scaling


def build(facts: Facts) -> GraniteForCausalLM:
    """Build the abstract model of a `granite` config.json."""
    embed, eps, vocab = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"]
    parts = attention(facts, bias=facts["attention_bias"]), mlp(facts, bias=facts["mlp_bias"])
    block = GraniteBlock(*parts, embed, eps, facts["residual_multiplier"])
    layers = Stack(block, (Pattern(facts["attention_multiplier"]),) * facts["num_hidden_layers"])
    model = GraniteModel(vocab, embed, eps, layers, whole_rope(facts), facts["embedding_multiplier"])
    return GraniteForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"], facts["logits_scaling"])
