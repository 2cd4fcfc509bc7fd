"""Gemma: Llama with norms of `1 + weight` and scaled embeddings (Gemma Team 2024, arXiv:2403.08295).

Legend: B batch, T query length, E embed, V vocab.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.mesh import constrain
from ftjax.models.attention import Pattern
from ftjax.models.cache import Memories
from ftjax.models.causal_lm import Sizes, read_sizes
from ftjax.models.context import Context
from ftjax.models.facts import Facts
from ftjax.models.layers import Embedding, IdentityAdapter, Linear, RMSNorm, is_virtual
from ftjax.models.llama import LlamaAttention, LlamaMLP, attention
from ftjax.models.rope import Rope, angles, every, make_rope, refuse_partial
from ftjax.models.stack import Stack
from ftjax.models.virtual import behind_virtual_tokens


def gemma_norm(size: int, eps: float) -> RMSNorm:
    """Build Gemma's norm, which multiplies by `1 + weight` before rounding."""
    return RMSNorm(size, eps, offset=1.0, round_first=False)


class GemmaBlock(nnx.Module):
    def __init__(self, attention: nnx.Module, mlp: nnx.Module, embed: int, eps: float):
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = gemma_norm(embed, eps)
        self.post_attention_layernorm = gemma_norm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        y, cache = self.self_attn(self.input_layernorm(x), ctx, pattern, layer, cache)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        x = x + self.output_adapters(x, self.mlp(self.post_attention_layernorm(x), ctx), ctx)
        return constrain(x, "batch", "length", None), cache, jnp.float32(0)


class GemmaModel(nnx.Module):
    """The model without its output projection. Blocks get the angles of `rope` as `ctx.rope`: of a single RoPE, or by name."""

    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack, rope: Rope | dict[str, Rope]):
        self.rope = rope
        self.scale = embed**0.5
        self.embed_tokens = Embedding(vocab, embed)
        self.layers = layers
        self.norm = gemma_norm(embed, eps)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return every(self.rope)

    def __call__(self, tokens: jax.Array, ctx: Context, cache: Memories = None):
        """Map tokens `[B, T]` to hidden states `[B, T, E]`; also return the cache and the auxiliary loss."""
        x = self.embed_tokens(tokens, ctx.dtype)
        if not is_virtual(tokens):  # virtual tokens are already scaled
            # Round the scale to the dtype, as Google's code does: sqrt(3072) is 55.5 in bfloat16.
            x = x * jnp.asarray(self.scale, ctx.dtype)
        x = constrain(x, "batch", "length", None)
        x, cache, aux = self.layers(x, replace(ctx, rope=angles(self.rope, ctx.positions, ctx.segment_ids)), cache)
        return self.norm(x), cache, aux


class GemmaForCausalLM(nnx.Module):
    """The model with its projection to the vocabulary; `softcap` caps the logits (Gemma 2)."""

    def __init__(self, model: GemmaModel, sizes: Sizes, tied: bool, softcap: float | None = None):
        self.sizes, self.ropes = sizes, model.ropes
        self.embedding = "model.embed_tokens"
        self.ignored = (".rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ()))
        self.output = self.embedding if tied else "lm_head"
        self.softcap = softcap
        self.model = model
        self.lm_head = None if tied else Linear(sizes.embed, sizes.vocab, ("embed", "vocab"))

    def hidden(self, tokens: jax.Array, ctx: Context, cache: Memories = None):
        return self.model(tokens, behind_virtual_tokens(self, tokens, ctx), cache)

    def unembed(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Project hidden states `[..., E]` to float32 logits `[..., V]`."""
        logits = self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x, ctx)
        logits = logits.astype(jnp.float32)
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
    block = GemmaBlock(*attention_and_mlp(facts, "hidden_act"), embed, eps)
    layers = Stack(block, (Pattern(scale=head_dim**-0.5),) * facts["num_hidden_layers"])
    model = GemmaModel(vocab, embed, eps, layers, make_rope(rope, head_dim, facts["max_position_embeddings"]))
    return GemmaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
