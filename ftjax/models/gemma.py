"""Gemma: Llama with norms of `1 + weight` and scaled embeddings (Gemma Team 2024, arXiv:2403.08295).

Legend: B batch, T query length, E embed, V vocab.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from ftjax.models.causal_lm import Sizes, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaAttention, LlamaBlock, LlamaForCausalLM, LlamaMLP, LlamaModel, attention
from ftjax.models.nn.context import Context, Tokens, is_virtual
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import RMSNorm
from ftjax.models.nn.rope import Rope, make_rope, refuse_partial
from ftjax.models.nn.stack import Stack


def gemma_norm(size: int, eps: float) -> RMSNorm:
    """Build Gemma's norm, which multiplies by `1 + weight` before rounding."""
    return RMSNorm(size, eps, offset=1.0, round_first=False)


class GemmaModel(LlamaModel):
    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack, rope: Rope | dict[str, Rope]):
        super().__init__(vocab, embed, eps, layers, rope, gemma_norm)
        self.scale = embed**0.5

    def embed(self, tokens: Tokens, dtype) -> Float[Array, "B T E"]:
        x = self.embed_tokens(tokens, dtype)
        # Virtual tokens are already scaled. The scale is rounded to the dtype, as in Google's code: sqrt(3072) is 55.5 in
        # bfloat16.
        return x if is_virtual(tokens) else x * jnp.asarray(self.scale, dtype)


class GemmaForCausalLM(LlamaForCausalLM):
    """The model with its projection to the vocabulary; `softcap` caps the logits (Gemma 2)."""

    def __init__(self, model: GemmaModel, sizes: Sizes, tied: bool, softcap: float | None = None):
        super().__init__(model, sizes, tied)
        self.softcap = softcap

    def unembed(self, x: Float[Array, "*of E"], ctx: Context) -> Float32[Array, "*of V"]:
        """Project hidden states `[..., E]` to float32 logits `[..., V]`."""
        logits = super().unembed(x, ctx)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


def attention_and_mlp(facts: Facts, act: str, **norms: nnx.Module) -> tuple[LlamaAttention, LlamaMLP]:
    """Build the attention and MLP of any Gemma; `act` is the name of the config field with the activation."""
    facts.only("use_bidirectional_attention", None, False, why="it makes an encoder, not a causal language model")
    mlp = LlamaMLP(facts["hidden_size"], facts["intermediate_size"], facts[act], False)
    return attention(facts, bias=facts["attention_bias"], **norms), mlp


def build(facts: Facts) -> GemmaForCausalLM:
    """Build the abstract model of a `gemma` config.json."""
    embed, eps, vocab, head_dim = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"], facts["head_dim"]
    facts.inert("hidden_activation")  # older exports name the activation twice; transformers reads hidden_act
    rope = refuse_partial(facts["rope_parameters"])
    block = LlamaBlock(*attention_and_mlp(facts, "hidden_act"), embed, eps, gemma_norm)
    layers = Stack(block, (Pattern(scale=head_dim**-0.5),) * facts["num_hidden_layers"])
    model = GemmaModel(vocab, embed, eps, layers, make_rope(rope, head_dim, facts["max_position_embeddings"]))
    return GemmaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
